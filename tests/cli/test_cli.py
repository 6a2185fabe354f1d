import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mfdetr_cli import recipes
from mfdetr_cli.app import app
from mfdetr_cli.output import CommandOutput
from typer.testing import CliRunner

from mfdetr_cache.errors import ConfigError, StoppedError
from tests.support.command import COMMANDS, mfdetr, run
from tests.support.training import SMALL


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_json(command: tuple[str, ...]) -> None:
    text = run(*command, "--help").output
    assert "Example:" in text
    assert f"mfdetr {' '.join(command)}" in text
    assert "--json" in text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_whole_in_eighty_columns(command: tuple[str, ...]) -> None:
    """Where options and their values leave no room, the table cuts names in the middle."""
    narrow = {"COLUMNS": "80", "TERM": "dumb"}
    text = CliRunner().invoke(app, [*command, "--help"], env=narrow).output
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_a_result_that_cannot_be_written_is_noticed_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file" / "a.json", "cannot be written there"),
    ):
        with pytest.raises(ConfigError, match=message):
            run("detectors", "--json", path)
    assert run("detectors", "--json", tmp_path / "new" / "a.json").exit_code == 0
    assert json.loads((tmp_path / "new" / "a.json").read_text())


def test_the_whole_way(tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path) -> None:
    cache, out = tmp_path / "c.zarr", tmp_path / "run"
    run(
        "extract", "--detector", "hf", "--weights", rtdetr_folder, "--images",
        scenes_folder / "images", "--annotations", scenes_folder / "instances.json", "--cache",
        cache, "--json", tmp_path / "extract.json", "--num-queries", 15, "--device", "cpu",
    )  # fmt: skip
    extracted = json.loads((tmp_path / "extract.json").read_text())
    assert extracted["num_images"] == 8
    assert set(extracted["box"]) == {"AP", "AP50", "AP75", "APS", "APM", "APL"}

    assert "complete" in run("cache", "info", cache, "--json", tmp_path / "info.json").output
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["complete"] is True
    assert info["cache_id"] == extracted["cache_id"]
    assert sum(a["share"] for a in info["arrays"]) < 1

    small = [x for k, v in SMALL.items() for x in ("--set", f"{k}={v}")]
    run(
        "train-head", "--cache", cache, "--val-cache", cache, "--out", out, "--recipe", "paper",
        *small, "--max-steps", 3, "--device", "cpu", "--json", tmp_path / "train.json",
    )  # fmt: skip
    trained = json.loads((tmp_path / "train.json").read_text())
    assert trained["steps"] == 3

    run("evaluate", "--cache", cache, "--head", out, "--oracles", "--json", tmp_path / "eval.json")
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert set(measured["oracles"]) == {"masks", "scores", "boxes", "labels", "found"}
    for kind in ("mask", "box", "floor", "ceiling"):
        assert set(measured[kind]) == {"AP", "AP50", "AP75", "APS", "APM", "APL"}
    assert measured["mask"] == trained["validation"]["mask"]
    assert measured["box"] == extracted["box"]


def test_verify_has_exit_code_1_for_a_fault(tmp_path: Path, drawn_cache: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(drawn_cache, copy)
    assert mfdetr("cache", "verify", copy, "--full").returncode == 0
    next(copy.glob("views/base/queries/c/0/0/0")).write_bytes(b"torn")
    finished = mfdetr("cache", "verify", copy, "--json", tmp_path / "v.json")
    assert finished.returncode == 1
    assert "1 of 1 part broken" in finished.stderr
    assert json.loads((tmp_path / "v.json").read_text())["broken_parts"] == [["base", 0]]
    assert mfdetr("cache", "verify", tmp_path / "absent").returncode == 2


def test_repair_mends_what_verify_finds(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(drawn_cache, copy)
    next(copy.glob("views/base/queries/c/0/0/0")).unlink()
    arguments = [
        "cache", "repair", copy, "--weights", rtdetr_folder, "--images", scenes_folder / "images",
        "--annotations", scenes_folder / "instances.json", "--device", "cpu",
    ]  # fmt: skip
    output = run(*arguments, "--json", tmp_path / "r.json").output
    assert "1 part extracted again (8 images)" in output
    assert json.loads((tmp_path / "r.json").read_text())["whole"] is True
    assert "nothing was broken" in run(*arguments).output


def test_an_ablation_without_a_row_that_can_be_is_wrong_input(
    tmp_path: Path, drawn_cache: Path
) -> None:
    finished = mfdetr(
        *("ablate", "--table", 14, "--cache", drawn_cache, "--val-cache", drawn_cache),
        *("--out", tmp_path / "out", "--json", tmp_path / "t.json"),
    )
    assert finished.returncode == 2
    assert finished.stderr.endswith("no row could be trained and measured; each says why above\n")
    assert all(row["problem"] for row in json.loads((tmp_path / "t.json").read_text())["rows"])


def test_a_dry_run_shows_the_papers_figures_beside_ours(tmp_path: Path) -> None:
    output = run("ablate", "--table", 4, "--dry-run", "--json", tmp_path / "t.json").output
    assert "66.61 / 66.60" in output
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["d=256", "d=128", "d=96", "d=64"]
    for row in rows:
        assert round(row["params_m"], 2) == row["paper_params_m"]
        assert row["macs_g"] == pytest.approx(row["paper_macs_g"], rel=0.01)
    assert [r["paper_AP"] for r in rows] == pytest.approx([0.449, 0.447, 0.446, 0.445])


@pytest.mark.parametrize("number", range(1, 17))
def test_every_table_can_be_looked_at(number: int, tmp_path: Path) -> None:
    output = run("ablate", "--table", number, "--dry-run", "--json", tmp_path / "t.json").output
    assert "G MACs, 800x1124" in output
    document = json.loads((tmp_path / "t.json").read_text())
    assert ("It needs" in output) == bool(document["needs"])
    for row in document["rows"]:
        trained = row["params_m"] > 0
        assert all((row[k] is not None) == trained for k in ("steps", "batch_size", "epochs"))


def test_plan_bench_certify_suggest_and_ablate_run(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    run(
        "plan", "--weights", rtdetr_folder, "--annotations", scenes_folder / "instances.json",
        "--images", scenes_folder / "images", "--disk", tmp_path, "--disk-seconds", 0.05,
        "--recipe", "demo", "--sample", 2, "--device", "cpu", "--json", tmp_path / "plan.json",
    )  # fmt: skip
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [p["preset"] for p in plan["presets"]] == ["fp16", "int8", "int8-small", "int4"]
    run("cache", "bench", drawn_cache, "--images", 2, "--json", tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["images"] == 2
    small = [x for k, v in SMALL.items() for x in ("--set", f"{k}={v}")]
    run(
        "ablate", "--recipe", "paper", "--cache", drawn_cache, "--val-cache", drawn_cache,
        "--out", tmp_path / "ab", "--max-steps", 1, *small, "--device", "cpu",
        "--json", tmp_path / "ab.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "ab.json").read_text())["rows"][0]["problem"] == ""
    copy = tmp_path / "copy.zarr"
    shutil.copytree(drawn_cache, copy)
    run(
        "cache", "certify", copy, "--head", tmp_path / "ab/rows/paper/seed-0", "--reference",
        drawn_cache, "--samples", 3, "--device", "cpu", "--json", tmp_path / "c.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "c.json").read_text())["difference"] == 0
    said = run(
        "cache", "suggest", copy, "--head", tmp_path / "ab/rows/paper/seed-0", "--count", 3,
        "--threshold", 0, "--device", "cpu", "--json", tmp_path / "s.json",
    ).output  # fmt: skip
    suggested = json.loads((tmp_path / "s.json").read_text())["images"]
    assert len(suggested) == 3
    assert all(image["file_name"] in said for image in suggested)
    assert "certified" in run("cache", "info", copy).output


def test_a_dataset_with_pasted_objects_is_made(tmp_path: Path, scenes_folder: Path) -> None:
    done = run(
        *("copy-paste", "--images", scenes_folder / "images", "--copies", 1),
        *("--annotations", scenes_folder / "instances.json", "--out", tmp_path / "pasted"),
        *("--json", tmp_path / "made.json"),
    )
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["num_images"] == 16
    assert Path(made["annotations"]).is_file()
    assert len(list(Path(made["images"]).iterdir())) == 16
    assert "mfdetr extract" in done.output


def test_a_results_file_is_measured(tmp_path: Path, scenes_folder: Path) -> None:
    annotations = scenes_folder / "instances.json"
    truth = json.loads(annotations.read_text())
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "score": 0.9,
            "bbox": a["bbox"],
        }
        for a in truth["annotations"]
    ]
    (tmp_path / "r.json").write_text(json.dumps(results))
    output = run("evaluate", "--results", tmp_path / "r.json", "--annotations", annotations).output
    assert "100.0" in output
    # Nobody drew masks of one category: a dash, beside its boxes.
    first = truth["annotations"][0]["category_id"]
    for annotation, result in zip(truth["annotations"], results, strict=True):
        result["segmentation"] = annotation["segmentation"]
        if annotation["category_id"] == first:
            annotation["segmentation"] = None
    (tmp_path / "r.json").write_text(json.dumps(results))
    (tmp_path / "a.json").write_text(json.dumps(truth))
    output = run(
        *("evaluate", "--results", tmp_path / "r.json", "--annotations", tmp_path / "a.json"),
        *("--per-category", "--no-boundary"),
    ).output
    name = next(c["name"] for c in truth["categories"] if c["id"] == first)
    row = next(line for line in output.splitlines() if line.startswith(name))
    assert row.split() == [name, "8", "-", "-", "100.0", "100.0"]
    assert "-100" not in output
    finished = mfdetr("evaluate", "--results", tmp_path / "r.json")
    assert finished.returncode == 2
    assert "--results FILE goes with --annotations FILE" in finished.stderr


def test_detectors_lists_and_writes(tmp_path: Path) -> None:
    assert "DEIMv2" in run("detectors", "--json", tmp_path / "d.json").output
    assert len(json.loads((tmp_path / "d.json").read_text())["detectors"]) == 41


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_idle_threads_of_openmp_sleep_unless_told_otherwise(
    given: dict[str, str], wanted: str
) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (
        "import os, sys, mfdetr_cli; "
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**kept, **given},
        check=True,
    )
    # OpenMP reads it once, when torch loads it.
    assert found.stdout.split() == [wanted, "False"]


def test_what_stops_a_task_ends_its_progress_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the cursor would stay hidden, and the bar be drawn over the error."""

    def stopped(_config: object, out: CommandOutput) -> None:
        for _ in range(2):
            out.reporter.start("read", 2, "images")
            out.reporter.advance()
            out.reporter.finish()
            out.reporter.finish()
        out.reporter.start("learn", 4, "images")
        out.reporter.advance()
        raise StoppedError("stopped")

    monkeypatch.setattr(recipes, "recipes", stopped)
    lines = mfdetr("recipes").stderr.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        *["read 50 %"] * 2,
        "learn 25 %",
        "error: stopped",
    ]
