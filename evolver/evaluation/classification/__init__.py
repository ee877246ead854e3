"""The evaluation of classifiers of texts and of images."""
