"""The registry: versions, references, labels, lineage, scores; from several processes, and in another database."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from store_tools import make, same

from veneer.store.adapters import read_adapter, read_manifest
from veneer.store.entry import Entry, Score, check_compatible
from veneer.store.index import LABELS, METADATA
from veneer.store.registry import Registry, as_parent
from veneer.store.reindex import reindex
from veneer.types import AdapterError, ConfigError, StorageError

MADE = {"tokenizer_digest": "t" * 64, "template_digest": "m" * 64}


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a socket in a folder of its own."""
    pytest.importorskip("psycopg", reason="needs psycopg, PostgreSQL's driver")
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("needs PostgreSQL's initdb and postgres on the PATH")
    folder = Path(tempfile.mkdtemp(prefix="veneer-pg-", dir="/tmp"))  # a socket's path must be short
    user = {"user": "nobody"} if os.geteuid() == 0 else {}  # the server refuses to run as root
    if user:
        shutil.chown(folder, "nobody")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **user}
    subprocess.run(["initdb", "-D", folder / "data", "-A", "trust", "-U", "veneer", "-E", "UTF8", "--no-sync"], check=True, **quiet)
    options = ["-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"]
    server = subprocess.Popen(["postgres", "-D", folder / "data", *options], **quiet)
    url = f"postgresql+psycopg://veneer@/postgres?host={folder}"
    try:
        for _ in range(200):
            try:
                sa.create_engine(url, poolclass=sa.NullPool).connect().close()
                break
            except sa.exc.OperationalError:
                time.sleep(0.05)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # PostgreSQL: now, waiting for nobody
        server.wait(20)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.xdist_group("postgresql"))])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """Where the index is: the default, or a database server by $VENEER_REGISTRY."""
    if request.param == "sqlite":
        yield None
        return
    address = request.getfixturevalue("postgres")
    monkeypatch.setenv("VENEER_REGISTRY", address)
    yield address
    METADATA.drop_all(sa.create_engine(address, poolclass=sa.NullPool))


@pytest.fixture
def registry(url: str | None) -> Registry:
    return Registry()


def child(reference: str, registry: Registry, stage: str = "rl") -> dict[str, Any]:
    """Facts of an adapter that was made from another."""
    return {**MADE, "stage": stage, "parents": [dataclasses.asdict(as_parent(registry.resolve(reference)))]}


# ---------------------------------------------------------------- versions and references


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", "..", ".", ".hidden", "", "a b", "x\n", "x" * 65, "ä", "a\0", "sha256:aa"])
def test_names_are_checked(name: str) -> None:
    """A name from a request must not become a path, nor another kind of reference."""
    registry = Registry()
    calls = [lambda: registry.put(name, make(), {}), lambda: registry.versions(name), lambda: registry.labels(name)]
    for call in [*calls, lambda: registry.rollback(name), lambda: registry.history(name)]:
        with pytest.raises(AdapterError, match="no adapter name"):
            call()
    assert not registry.folder.exists()


def test_versions(registry: Registry) -> None:
    """name is the newest, name@2 the second, and the same weights are the same version."""
    assert registry.names() == []
    assert [registry.put("x", make(v), {}) for v in (0.1, 0.2, 0.1, 0.3)] == [1, 2, 1, 3]
    assert registry.put("y", make(0.1), {}) == 1
    assert (registry.names(), registry.versions("x"), registry.versions("z")) == (["x", "y"], [1, 2, 3], [])
    for reference, value in (("x", 0.3), ("x@", 0.3), ("x@2", 0.2), ("x@1", 0.1)):
        checkpoint, entry = registry.read(reference)
        assert same(checkpoint.weights, make(value).weights)
        assert (entry.digest, checkpoint.adapter.name) == (make(value).adapter.digest, "x")
    assert registry.put("x", make(0.1), {"template_digest": "another"}) == 4  # the same weights, made for something else


def test_an_entry_says_what_there_is(registry: Registry) -> None:
    """What a server needs to know before it loads anything."""
    score = Score("sort", 0.5, 0.4, 0.6, 9, 3, "2026-01-01T00:00:00Z", {"max_tokens": 9})
    registry.put("p", make(0.1), MADE)
    facts = {**child("p", registry, "sft"), "env": "sort", "scores": [dataclasses.asdict(score)]}
    registry.put("x", make(0.5), facts)
    entry = registry.resolve("x")
    checkpoint = make(0.5)
    assert (entry.reference, entry.name, entry.version, entry.stage, entry.rank) == ("x@1", "x", 1, "sft", 2)
    assert (entry.base_id, entry.base_digest, entry.digest) == ("nano", "b" * 64, checkpoint.adapter.digest)
    assert (entry.tokenizer_digest, entry.template_digest) == ("t" * 64, "m" * 64)
    assert entry.parents == (as_parent(registry.resolve("p@1")),)
    assert entry.scores == (score,)
    assert (entry.trusted, entry.signed_by, entry.labels) == (True, registry.keys.own(), ())
    manifest = read_manifest(entry.folder)
    assert (manifest["name"], manifest["registry"]["version"], manifest["env"], manifest["version"]) == ("x", 1, "sort", 7)
    assert json.loads(json.dumps(entry.document()))["parents"][0]["reference"] == "p@1"


def test_full_copies_have_no_rank(registry: Registry) -> None:
    """They are kept beside adapters, and are no PEFT folders."""
    full = dataclasses.replace(make(), config=None)
    from veneer.digest import digest_adapter

    full = dataclasses.replace(full, adapter=dataclasses.replace(full.adapter, digest=digest_adapter(full.weights, None)))
    registry.put("x", full, {})
    assert registry.resolve("x").rank is None
    with pytest.raises(AdapterError, match="fully fine-tuned"):
        registry.export("x", Path("nowhere"))


def test_a_folder_somewhere_else(tmp_path: Path) -> None:
    """A path is an adapter too; it has no version here."""
    registry = Registry()
    registry.put("x", make(), MADE)
    registry.export("x", tmp_path / "out")
    entry = Registry(tmp_path / "other").resolve(str(tmp_path / "out"))
    assert (entry.name, entry.version, entry.reference, entry.trusted) == ("x", 0, str(tmp_path / "out"), False)
    assert entry.signed_by == registry.keys.own()
    with pytest.raises(AdapterError, match="outside of the registry"):
        registry.add_score(str(tmp_path / "out"), Score("sort", 0.5, 0.4, 0.6, 9, 3, ""))
    with pytest.raises(AdapterError, match="outside of the registry"):
        registry.forget(str(tmp_path / "out"))


def test_by_digest(registry: Registry) -> None:
    """The weights themselves as a reference: any beginning that means one."""
    for value in (0.1, 0.2):
        registry.put("x", make(value), {})
    registry.put("y", make(0.1), {})
    digest = make(0.1).adapter.digest
    assert registry.resolve(f"sha256:{digest}").reference == "x@1"
    assert registry.resolve(f"sha256:{digest[:8]}").reference == "x@1"
    for wrong, words in (
        ("sha256:", "no digest"),
        ("sha256:xyz", "no digest"),
        ("sha256:%", "no digest"),
        (f"sha256:{'0' * 64}", "begins so"),
    ):
        with pytest.raises(AdapterError, match=words):
            registry.resolve(wrong)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("zzz", "there are: arithmetic, x$"),
        ("arithmetics", "did you mean 'arithmetic'"),
        ("x@9", "no version 9; it has 1$"),
        ("x@0", "no version 0; it has 1$"),
        ("x@one", "no version 'one' and no label of that name; it has 1, and the labels beta"),
        ("x@" + "9" * 5000, "it has 1"),
        ("a/b", "no adapter folder a/b"),
        ("../nowhere/at/all", "no adapter folder"),
        ("/etc", "no Veneer adapter"),
    ],
)
def test_what_is_not_there(reference: str, words: str) -> None:
    """The answer says what there is, and the nearest name."""
    registry = Registry()
    registry.put("x", make(), {})
    registry.put("arithmetic", make(), {})
    registry.promote("x", 1, "beta")
    with pytest.raises(AdapterError, match=words) as caught:
        registry.resolve(reference)
    assert "\n" not in str(caught.value)


def test_the_same_weights_are_stored_once() -> None:
    """A fork for each of a thousand customers costs a manifest each."""
    registry = Registry()
    registry.put("x", make(), MADE)
    forks = [registry.fork("x", f"customer{i}") for i in range(3)]
    files = {(entry.folder / "adapter_model.safetensors").stat().st_ino for entry in [registry.resolve("x"), *forks]}
    assert len(files) == 1
    registry.forget("x", children="keep")
    assert same(registry.read("customer2")[0].weights, make().weights)


def test_looking_writes_nothing(tmp_path: Path) -> None:
    """Not even an empty database."""
    registry = Registry(tmp_path / "home")
    assert (registry.names(), registry.entries(), registry.versions("x"), registry.labels("x"), registry.history("x")) == (
        [],
        [],
        [],
        {},
        [],
    )
    with pytest.raises(AdapterError, match="there are: none"):
        registry.resolve("x")
    assert registry.notice_forgotten() == []
    assert not (tmp_path / "home").exists()


# ---------------------------------------------------------------- labels


def test_promote_and_rollback(registry: Registry) -> None:
    """A bare name is what ``live`` points to; rollbacks walk back, and nothing of the history is lost."""
    for value in (0.1, 0.2, 0.3, 0.4):
        registry.put("x", make(value), {})
    assert registry.resolve("x").version == 4
    with pytest.raises(AdapterError, match="promote a version first"):
        registry.rollback("x")
    for version in (1, 2, 2, 3):
        assert registry.promote("x", version).labels == ("live",)
    assert (registry.resolve("x").version, registry.resolve("x@live").version, registry.resolve("x@4").version) == (3, 3, 4)
    registry.promote("x", 4, "beta")
    assert registry.labels("x") == {"live": 3, "beta": 4}
    assert [registry.rollback("x").version, registry.rollback("x").version] == [2, 1]
    assert registry.resolve("x").version == 1
    with pytest.raises(AdapterError, match="no other version before"):
        registry.rollback("x")
    registry.promote("x", 4)
    assert registry.resolve("x@4").labels == ("beta", "live")
    assert registry.rollback("x").version == 1
    assert [version for _, version in registry.history("x")] == [1, 2, 3, 2, 1, 4, 1]
    assert registry.labels("y") == {}


def test_rollback_steps_over_what_is_forgotten(registry: Registry) -> None:
    """Also from a label that was taken away with its version."""
    for value in (0.1, 0.2, 0.3):
        version = registry.put("x", make(value), {})
        registry.promote("x", version)
    registry.forget("x@2")
    assert registry.rollback("x").version == 1
    registry.promote("x", 3)
    registry.forget("x@3")
    assert (registry.labels("x"), [v for _, v in registry.history("x")]) == ({}, [1, 2, 3, 1, 3, None])
    assert registry.rollback("x").version == 1
    with pytest.raises(AdapterError, match="no other version before"):
        registry.rollback("x")


@pytest.mark.parametrize("label", ["3", "", "a b", "a@b", "é", "x" * 65, "-x"])
def test_labels_are_checked(label: str) -> None:
    """A label that looks like a version would hide it."""
    registry = Registry()
    registry.put("x", make(), {})
    with pytest.raises(AdapterError, match="is no label"):
        registry.promote("x", 1, label)
    with pytest.raises(AdapterError, match="no version 2"):
        registry.promote("x", 2)


def test_a_damaged_version_is_not_promoted() -> None:
    """It would be found out by the first customer."""
    registry = Registry()
    for value in (0.1, 0.2):
        registry.put("x", make(value), {})
    registry.promote("x", 1)
    (registry.resolve("x@2").folder / "README.md").write_text("")
    with pytest.raises(AdapterError, match=r"README\.md was changed"):
        registry.promote("x", 2)
    assert registry.resolve("x").version == 1


# ---------------------------------------------------------------- lineage and scores


def test_lineage(registry: Registry) -> None:
    """From SFT by RL and a fork back to the base; through a stack; and past what is gone."""
    registry.put("a", make(0.1), {**MADE, "stage": "sft"})
    registry.put("b", make(0.2), child("a@1", registry))
    fork = registry.fork("b", "c")
    assert (fork.reference, fork.stage, fork.digest) == ("c@1", "fork", make(0.2).adapter.digest)
    chain = registry.lineage("c")
    assert [(a.reference, a.stage, a.depth, a.state) for a in chain] == [
        ("c@1", "fork", 0, "here"),
        ("b@1", "rl", 1, "here"),
        ("a@1", "sft", 2, "here"),
        ("nano", "base", 3, "here"),
    ]
    parents = [dataclasses.asdict(as_parent(registry.resolve(r), s)) for r, s in (("c@1", 1.0), ("a@1", -0.5))]
    registry.put("s", make(0.4), {**MADE, "stage": "stack", "parents": parents})
    assert [p.scale for p in registry.resolve("s").parents] == [1.0, -0.5]
    assert [(a.reference, a.depth) for a in registry.lineage("s")] == [("s@1", 0), ("c@1", 1), ("a@1", 1), ("b@1", 2), ("nano", 3)]
    assert [e.reference for e in registry.children(registry.resolve("a"))] == ["b@1", "s@1"]
    registry.forget("b", children="keep")
    assert [(a.reference, a.state) for a in registry.lineage("c")] == [("c@1", "here"), ("b@1", "forgotten"), ("nano", "here")]
    elsewhere = {**MADE, "stage": "import", "parents": [{"reference": "a@1", "digest": "f" * 64}]}
    registry.put("d", make(0.5), elsewhere)
    assert [(a.reference, a.state) for a in registry.lineage("d")][1] == ("a@1", "elsewhere"), "another a@1 than ours"
    with pytest.raises(AdapterError, match="'c' already"):
        registry.fork("a", "c")


def test_scores(registry: Registry) -> None:
    """Several environments, several times; each with its interval, in the order they were measured."""
    registry.put("x", make(), {})
    scores = [
        Score("sort", 0.5, 0.41, 0.59, 120, 0, "2026-01-01T00:00:00Z"),
        Score("sums", 1 / 3, 0.2, 0.5, 30, 2**40, "2026-01-02T00:00:00Z", {"args": {"digits": 3}, "max_tokens": 72}),
        Score("sort", 0.6, 0.51, 0.69, 120, 1, "2026-01-03T00:00:00Z"),
    ]
    for score in scores:
        registry.add_score("x@1", score)
    assert registry.resolve("x").scores == tuple(scores)


def test_what_fits() -> None:
    """Base, tokenizer and template, of an entry or a manifest; what neither side knows is not compared."""
    registry = Registry()
    registry.put("x", make(), MADE)
    entry = registry.resolve("x")
    here = {"base_digest": "b" * 64, **MADE}
    for made in (entry, read_manifest(entry.folder)):
        check_compatible(made, **here)
        check_compatible(made, "b" * 64, None, None)
        for key, words in (
            ("base_digest", "was made for base 'nano'"),
            ("tokenizer_digest", "another tokenizer"),
            ("template_digest", "chat template"),
        ):
            with pytest.raises(AdapterError, match=words):
                check_compatible(made, **(here | {key: "0" * 64}))
    check_compatible(dataclasses.replace(entry, tokenizer_digest=None, template_digest=None), **here)
    with pytest.raises(AdapterError, match="the run in /r was made"):
        check_compatible(entry, "0" * 64, None, None, what="the run in /r")


# ---------------------------------------------------------------- several processes, several threads

PUT = """
import sys
sys.path.insert(0, sys.argv[1])
from store_tools import make
from veneer.store.registry import Registry
print("ready", flush=True)
sys.stdin.readline()
print(*[Registry().put("x", make(float(value)), {}) for value in sys.argv[2:]])
"""


def at_once(script: str, *arguments: list[str]) -> list[str]:
    """Run a script in as many processes as there are arguments; each says that it is ready and waits for the word go."""
    here = str(Path(__file__).parent)
    started = [
        subprocess.Popen([sys.executable, "-c", script, here, *own], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for own in arguments
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    return outputs


def test_two_puts_never_take_one_number(registry: Registry) -> None:
    """Four processes, five versions each, a new database; then the same weights from all of them."""
    mine = [[str(0.01 * (10 * i + j + 1)) for j in range(5)] for i in range(4)]
    numbers = [int(number) for output in at_once(PUT, *mine) for number in output.split()]
    assert sorted(numbers) == list(range(1, 21))
    assert registry.versions("x") == list(range(1, 21))
    for own, output in zip(mine, [numbers[i : i + 5] for i in range(0, 20, 5)], strict=True):
        for value, number in zip(own, output, strict=True):
            assert registry.read(f"x@{number}")[1].digest == make(float(value)).adapter.digest
    same_weights = {output.strip() for output in at_once(PUT, *[["0.9"]] * 4)}
    assert len(same_weights) == 1
    assert registry.versions("x") == list(range(1, 22))
    assert registry.put("x", make(0.8), {}) == 22, "no number was lost"
    registry.forget("x@22")
    assert len(list(registry.objects.iterdir())) == 21


def killed_at(line: int, home: Path) -> bool:
    """Put x in a process that is killed before that many lines of the store have run. Returns whether it came so far."""
    child = os.fork()
    if child == 0:
        left = line

        def count(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if "veneer/store/" not in frame.f_code.co_filename:
                return None
            left -= event == "line"
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        sys.settrace(count)
        Registry(home).put("x", make(0.3), {**MADE, "scores": [dataclasses.asdict(Score("sort", 0.5, 0.4, 0.6, 9, 3, str(line)))]})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_put_that_is_killed_at_any_line(tmp_path: Path) -> None:
    """The same again has the number that the first would have had, whatever was scored meanwhile, and forgetting finds every copy."""
    lines, moments = 0, set[tuple[int, int]]()
    while killed_at(lines := lines + 7, home := tmp_path / str(lines)):
        registry = Registry(home)
        known, folders = len(registry.entries()), len([*registry.objects.glob("[!.]*")])
        moments.add((known, folders))
        assert registry.put("x", make(0.3), MADE) == 1
        assert registry.versions("x") == [1]
        assert same(registry.read("x@1")[0].weights, make(0.3).weights)
        assert registry.put("x", make(0.4), MADE) == 2
        assert reindex(registry).added == ()
        registry.forget("x@1")
        assert [*registry.objects.iterdir()] == [registry.resolve("x@2").folder]
    assert lines > 100
    assert moments - {(1, 1)} == {(0, 0), (0, 1)}, "nothing there, or only the folder; nobody was killed behind the last of it"


MOVE = """
import sys
from veneer.store.registry import Registry
registry = Registry()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30):
    registry.promote("x", 2)
    registry.rollback("x")
"""


def test_labels_move_while_others_read(registry: Registry) -> None:
    """Whoever resolves a name gets one version whole, before or after the move, and never an error."""
    for value in (0.1, 0.2):
        registry.put("x", make(value), {})
    registry.promote("x", 1)
    wanted = {1: make(0.1).adapter.digest, 2: make(0.2).adapter.digest}
    seen: list[Entry] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                checkpoint, entry = registry.read("x")
                assert (checkpoint.adapter.digest, entry.digest) == (wanted[entry.version],) * 2
                seen.append(entry)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        at_once(MOVE, [])
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert errors == []
    assert {entry.version for entry in seen} == {1, 2}
    assert registry.resolve("x").version == 1
    assert len(registry.history("x")) == 61


PROMOTE = """
import sys
from veneer.store.registry import Registry
registry = Registry()
print("ready", flush=True)
sys.stdin.readline()
for i in range(15):
    registry.index.promote("x", int(sys.argv[2 + i % 2]), "live")
"""


def test_moves_of_one_label_wait_for_each_other(registry: Registry) -> None:
    """Four processes promote at once: each move stands on the one before it, so that rollbacks find every step."""
    for i in range(8):
        registry.put("x", make(0.1 * (i + 1)), {})
    at_once(PROMOTE, *[[str(2 * i + 1), str(2 * i + 2)] for i in range(4)])
    with registry.index.engine.connect() as connection:
        moves = connection.execute(sa.select(LABELS.c.id, LABELS.c.back_to).order_by(LABELS.c.id)).all()
    assert len(moves) > 50
    assert [back for _, back in moves] == [None, *(number for number, _ in moves[:-1])]


def test_an_answer_is_of_one_moment(registry: Registry, url: str | None) -> None:
    """A version is put and promoted between two queries of a reader, who must not end up with a third one that nobody promoted."""
    if url is None:
        pytest.skip("SQLite holds writers off while somebody reads")
    for value in (0.1, 0.2):
        registry.put("x", make(value), {})
    registry.promote("x", 1)
    other, moved = Registry(), []

    @sa.event.listens_for(registry.index.engine, "after_cursor_execute")
    def after(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM adapter_versions" in statement and not moved:
            moved.append(True)
            other.promote("x", other.put("x", make(0.3), {}))

    assert (registry.resolve("x").version, registry.resolve("x").version) == (1, 3)
    assert moved


# ---------------------------------------------------------------- another database


def test_another_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument or by the environment; the default file is then not made."""
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    Registry(url=elsewhere).put("x", make(), {})
    assert (tmp_path / "elsewhere.sqlite").is_file()
    assert not Registry().index.file.exists()
    assert Registry().names() == []
    monkeypatch.setenv("VENEER_REGISTRY", elsewhere)
    assert Registry().names() == ["x"]
    assert Registry(url=f"sqlite:///{tmp_path / 'third.sqlite'}").names() == []


def test_a_home_of_any_name(tmp_path: Path) -> None:
    """Paths are not URLs: what would end one is part of a name."""
    home = tmp_path / "a b?c=d#e%20é"
    Registry(home).put("x", make(), {})
    assert (home / "adapters/index.sqlite").is_file()
    assert Registry(home).names() == ["x"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "no URL"),
        ("dbase://x", "none that SQLAlchemy knows"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("mysql+nosuchdriver://u:secret@h/d", "none that SQLAlchemy knows"),
        ("oracle://u:secret@h/d", "needs the package 'oracledb'"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, words: str) -> None:
    """One line, and no password in it."""
    with pytest.raises(ConfigError, match=words) as caught:
        Registry(url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"this is no database", b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_index_says_what_to_do(content: bytes) -> None:
    """The adapters are still there."""
    registry = Registry()
    registry.put("x", make(), {})
    registry.index.file.write_bytes(content)
    with pytest.raises(StorageError, match="veneer adapters reindex") as caught:
        Registry().resolve("x")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_in_this_home() -> None:
    """An index that several homes share, or a folder that somebody moved."""
    registry = Registry()
    registry.put("x", make(), {})
    shutil.rmtree(registry.resolve("x").folder)
    with pytest.raises(AdapterError, match="the files of x@1 are not in this home"):
        registry.read("x")
    with pytest.raises(AdapterError):
        read_adapter(registry.resolve("x").folder)


def test_changes_of_a_name_are_counted(home: Path, url: str) -> None:
    """A server that asks for changes alone must learn of every one, and of nobody else's."""
    registry, other = Registry(home), Registry(home)
    assert registry.changes("a") is None
    registry.put("a", make(1), MADE)
    registry.put("b", make(2), MADE)
    seen = [registry.changes("a")]
    score = Score("sums", 0.5, 0.4, 0.6, 64, 0, "2026-01-01T00:00:00Z")
    for change in (
        lambda: other.put("a", make(3), MADE),
        lambda: other.promote("a", 1),
        lambda: other.promote("a", 2),
        lambda: other.rollback("a"),
        lambda: other.add_score("a@1", score),
        lambda: other.forget("a@2"),
    ):
        change()
        seen.append(registry.changes("a"))
        registry.resolve("a")
        other.put("b", make(2), MADE)
        assert registry.changes("a") == seen[-1], "reading changes nothing, and neither does another name"
    assert len(set(seen)) == len(seen)
    other.forget("a")
    assert registry.changes("a") not in seen
