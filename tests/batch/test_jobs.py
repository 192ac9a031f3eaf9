"""Which checkpoints a batch takes, and where it puts them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from onp.batch.jobs import Job, check_distinct, jobs_of_list, jobs_of_paths, shard_of
from onp.errors import UsageError

OUT = Path("out")


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hub/a/m.pt", "hub/b/m.pth", "hub/c.safetensors", "hub/notes.txt", "x/m.pt"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_keeps_its_order_and_its_shape() -> None:
    jobs = jobs_of_paths([Path("hub")], "vgg11", OUT)
    assert jobs == [
        Job(Path("hub/a/m.pt"), "vgg11", Path("out/a/m.pt.safetensors")),
        Job(Path("hub/b/m.pth"), "vgg11", Path("out/b/m.pth.safetensors")),
        Job(Path("hub/c.safetensors"), "vgg11", Path("out/c.safetensors")),
    ]
    assert jobs[0].report == Path("out/a/m.pt.json")


def test_files_go_by_their_names_whatever_they_end_in() -> None:
    jobs = jobs_of_paths([Path("x/m.pt"), Path("hub/notes.txt"), Path("x/m.pt")], None, OUT)
    assert [job.out for job in jobs] == [OUT / "m.pt.safetensors", OUT / "notes.txt.safetensors"]


def test_what_is_repaired_is_not_taken_for_a_model() -> None:
    out = Path("hub/out")
    (out / "a").mkdir(parents=True)
    (out / "a" / "m.safetensors").touch()
    assert len(jobs_of_paths([Path("hub")], None, out)) == 3
    for holds in ("hub", "."):
        with pytest.raises(UsageError, match=f"--out {holds} holds the models of hub"):
            jobs_of_paths([Path("hub")], None, Path(holds))


def test_a_list_has_kinds_of_its_own() -> None:
    Path("hub/list.csv").write_text(
        "arch,model\nresnet18,a/m.pt\n,../x/m.pt\n\nvgg16,c.safetensors\n"
    )
    jobs = jobs_of_list(Path("hub/list.csv"), "vgg11", OUT)
    assert [(job.model, job.arch, job.out) for job in jobs] == [
        (Path("hub/a/m.pt"), "resnet18", OUT / "a" / "m.pt.safetensors"),
        (Path("hub/../x/m.pt"), "vgg11", OUT / "x" / "m.pt.safetensors"),
        (Path("hub/c.safetensors"), "vgg16", OUT / "c.safetensors"),
    ]
    absolute = Path("x/m.pt").resolve()
    Path("list.csv").write_text(f"model\n{absolute}\n")
    (job,) = jobs_of_list(Path("list.csv"), "vgg11", OUT)
    assert job.out == OUT / f"{absolute.relative_to('/')}.safetensors"


def test_a_list_may_name_suspected_classes() -> None:
    Path("hub/list.csv").write_text("model,target\na/m.pt,7\nc.safetensors,\n")
    jobs = jobs_of_list(Path("hub/list.csv"), "vgg11", OUT)
    assert [job.target for job in jobs] == ["7", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a column model, and may have arch and target, got none"),
        ("path\na.pt\n", "must have a column model, and may have arch and target, got path"),
        ("model,size\na.pt,1\n", "got model, size"),
        ("model\n", "names no model"),
        ("model\nmissing.pt\n", "line 2: no such file: missing.pt"),
        ("model\nhub\n", "line 2: no such file: hub"),
        ("model,arch\nx/m.pt,vgg11,3\n", "line 2: expected a model"),
        ("model,arch\n,vgg11\n", "line 2: expected a model"),
        ("model\n" + "x" * 200_000, "line 2: field larger than"),
        ("model\n" + "x" * 300, "File name too long"),
    ],
)
def test_lists_that_cannot_be_used(text: str, message: str) -> None:
    Path("list.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        jobs_of_list(Path("list.csv"), None, OUT)


def test_lists_that_cannot_be_read() -> None:
    with pytest.raises(UsageError, match=r"cannot read nowhere\.csv"):
        jobs_of_list(Path("nowhere.csv"), None, OUT)
    Path("list.csv").write_bytes(b"model\n\xff\n")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        jobs_of_list(Path("list.csv"), None, OUT)


def test_paths_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="model not found: y"):
        jobs_of_paths([Path("y")], None, OUT)
    with pytest.raises(UsageError, match=r"cannot read x+: File name too long"):
        jobs_of_paths([Path("x" * 300)], None, OUT)
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.safetensors, \.pt, \.pth file in empty"):
        jobs_of_paths([Path("empty")], None, OUT)


def test_no_file_is_written_twice_and_no_model_written_over() -> None:
    with pytest.raises(UsageError, match=r"hub/a/m\.pt and x/m\.pt would both be written"):
        check_distinct(jobs_of_paths([Path("hub/a/m.pt"), Path("x/m.pt")], None, OUT))
    with pytest.raises(UsageError, match="written over a model"):
        check_distinct(jobs_of_paths([Path("hub/c.safetensors")], None, Path("hub")))
    check_distinct(jobs_of_paths([Path("hub"), Path("x/m.pt")], None, OUT))


def test_shards_are_a_partition() -> None:
    jobs = [Job(Path(f"{i}.pt"), None, Path(f"{i}.safetensors")) for i in range(7)]
    parts = [shard_of(jobs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(chain(*parts), key=jobs.index) == jobs
    assert [len(part) for part in parts] == [3, 2, 2]
    assert shard_of(jobs, "1/1") == jobs


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "/", "a/b", "-1/2", "1/0", "1/2/3"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--shard must be i/n"):
        shard_of([], text)
