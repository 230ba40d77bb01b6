"""The performance tables: what they show, and that they are current."""

import json

import pytest

from benchmarks import table
from benchmarks._harness import BOTH, OURS

ENVIRONMENT = {
    "device": "Some CPU", "device_type": "cpu", "cpu": "Some CPU", "threads": 2, "python": "3.11.0",
    "versions": {"torch": "2.13.0", "triton": None}, "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02",
}  # fmt: skip
GPU = ENVIRONMENT | {"device": "A GPU", "device_type": "cuda", "driver": "600.1"}


def row(n, ms, **peers):
    entries = {OURS: {"status": "ok", "ms": ms, "error": 1e-7, "peak_bytes": 2e6}, **peers}
    return {"case": {"N": n}, "mode": BOTH, "headline": True, "implementations": entries}


FASTER = {"status": "ok", "ms": 6.0, "ratio": 3.0, "ratio_p20": 2.9, "ratio_p80": 3.1, "peak_bytes": 8e6}


def document(environment, *rows, **more):
    return {"environment": environment, "families": {"conv": {"rows": list(rows), "scaling": []}}, **more}


def expected(*sizes):
    return {("cpu", "conv"): [({"N": 64}, BOTH)], ("cuda", "conv"): [({"N": n}, BOTH) for n in sizes]}


def test_measured_and_unmeasured_rows():
    peers = {"peer": FASTER, "absent": {"status": "not installed", "detail": "x"}}
    text = table.render({"conv_cpu.json": document(ENVIRONMENT, row(64, 2.0, **peers))}, ["conv"], expected(128))
    cpu = "| N 64 | forward+backward | CPU | 2.00 ms | peer 3.00× (2.90–3.10); absent not installed "
    assert cpu + "| 2.00 MB; peer 8.00 MB | 1e-07 |" in text
    assert "| N 128 | forward+backward | GPU | not measured | – | – | – |" in text
    assert "`conv_cpu.json`: Some CPU, 2 threads, Python 3.11.0, torch 2.13.0, commit 0123456789ab, 2026-01-02." in text


def test_a_gpu_result_stands_for_its_device_and_names_what_it_lacks():
    tests = {"passed": 3, "failed": 0, "skipped": 1}
    documents = {"gpu_a.json": document(GPU, row(128, 0.5, peer=FASTER), tests=tests)}
    text = table.render(documents, ["conv"], expected(128, 256))
    assert "| N 128 | forward+backward | A GPU | 500 µs |" in text
    assert "| N 256 | forward+backward | A GPU | not measured |" in text
    assert "| N 64 | forward+backward | CPU | not measured |" in text
    assert "A GPU (driver 600.1)" in text
    assert "3 passed, 0 failed, 1 skipped" in text


def test_the_brief_table_counts_what_was_not_measured():
    documents = {"conv_cpu.json": document(ENVIRONMENT, row(64, 2.0, peer=FASTER))}
    text = table.render(documents, ["conv"], expected(128, 256), brief=True)
    assert "| N 64 | forward+backward | CPU | 2.00 ms |" in text
    assert "| 2 shapes | forward+backward | GPU | not measured | – | – | – |" in text
    assert "N 128" not in text


def test_a_wrong_result_of_ours_shows_no_time():
    wrong = row(64, 2.0, peer=FASTER)
    wrong["implementations"][OURS] = {"status": "wrong", "error": 0.5, "detail": "relative error 5e-01"}
    text = table.render({"c.json": document(ENVIRONMENT, wrong)}, ["conv"], expected())
    assert "| N 64 | forward+backward | CPU | wrong: relative error 5e-01 |" in text
    assert "3.00×" not in text


def test_only_the_region_between_the_markers_changes():
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    new = table.replaced(readme, "new")
    assert new == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.replaced(new, "new") == new
    with pytest.raises(ValueError, match="once each"):
        table.replaced("no markers", "new")
    with pytest.raises(ValueError, match="once each"):
        table.replaced(f"{table.END} {table.BEGIN}", "new")


def test_other_json_files_are_passed_over(tmp_path):
    (tmp_path / "aot.json").write_text('{"kernels": []}')
    (tmp_path / "conv_cpu.json").write_text(json.dumps(document(ENVIRONMENT)))
    assert list(table.load_documents(tmp_path)) == ["conv_cpu.json"]


def test_check_says_which_page_is_stale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "PAGES", {"README.md": True, "full.md": False})
    monkeypatch.setattr(table, "current_text", lambda brief: "brief" if brief else "full")
    readme = tmp_path / "README.md"
    readme.write_text(f"{table.BEGIN}\nold\n{table.END}\n")
    (tmp_path / "full.md").write_text(f"{table.BEGIN}\nfull\n{table.END}\n")
    assert table.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "README.md" in error and "stale" in error and "full.md" not in error
    assert "old" in readme.read_text()
    assert table.main([]) == 0
    assert table.main(["--check"]) == 0


def test_the_tables_are_current():
    assert table.main(["--check"]) == 0, "run `python -m benchmarks.table`"
