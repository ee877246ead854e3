import sys; sys.path.insert(0, "/work/main/tests")
from test_evaluating_less import *
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("more", [{}, {"search.mode": "generational"}, {"search.merger": {"method": "simple"}}])
def test_probe(make_config, tmp_path, alpha, more):
    file = make_config(tmp_path, RACING | more | {"evaluation.racing": alpha, "search.generations": 6})
    folder = run_here(file, tmp_path / "r")
    plain = run_here(make_config(tmp_path, RACING | more | {"evaluation.racing": None, "search.generations": 6}, "p.yaml"), tmp_path / "p")
    ready = prepare(str(file)); worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    out = []
    for r in searched(folder).values():
        if r["raced"]:
            full = worker.evaluate(Candidate(0, load_recipe(r["recipe"]), "t"))
            out.append((len(r["items"]), round(80*r["bar"]), round(80*full.score)))
    print("\nPROBE", alpha, more, cost(folder), cost(plain), out)
