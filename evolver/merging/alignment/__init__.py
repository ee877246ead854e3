"""Hidden units of one model re-ordered so that they match another's, before the two are merged.

Which axes of which tensors may be re-ordered (``layouts``), how an order is found (``matching``, ``transport``), for a
whole model, once (``orders``), and a model that is seen in that order (``realigned``).
"""
