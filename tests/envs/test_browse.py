"""browse: a site that is really served, and questions that only reading answers."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Generator
from typing import Any
from urllib.parse import quote, urljoin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world_play import answered, called, gold, play_wild, played, recipe, said, wild

from veneer.envs import load_env
from veneer.envs.worlds.browse import Browse, browse
from veneer.envs.worlds.site import Site
from veneer.types import ConfigError, Split


@pytest.fixture(scope="module")
def sites() -> Generator[Browse]:
    dataset = browse()
    yield dataset
    asyncio.run(dataset.close())


def get(url: str) -> tuple[int, str]:
    """By a client that is not ours."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def base(dataset: Browse) -> str:
    return f"http://127.0.0.1:{dataset.serve()}"


@pytest.mark.parametrize(
    "size",
    [{}, {"hops": 3}, {"hops": 4, "entities": 20}, {"entities": 4, "facts": 12}, {"hops": 4, "entities": 60}, {"hops": 4, "entities": 4}],
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_gold_earns_one_and_reads_every_page(size: dict[str, int], split: Split) -> None:
    """A site on which the answer cannot be found punishes good policies."""

    async def main() -> None:
        dataset = browse(**size)
        hops = size.get("hops", 2)
        for index in range(12):
            _, result = await gold(dataset.env(split, index))
            assert result.reward == 1.0
            assert (result.metrics["hops"], result.metrics["unread"], result.metrics["turns"]) == (hops, 0, hops + 2)
        await dataset.close()

    asyncio.run(main())


def test_the_answer_shows_on_the_last_page_alone(sites: Browse) -> None:
    """If an earlier page told it, one hop would do."""

    async def main() -> None:
        for index in range(100):
            messages, _ = await gold(sites.env("train", index))
            *earlier, last = [m["content"] for m in messages if m["role"] == "tool"]
            answer = messages[-1]["content"]
            assert answer in last
            assert not any(answer in text for text in earlier)

    asyncio.run(main())


def follow(site: Site, title: str) -> str:
    """Where the question's facts lead from a page."""
    for relation in site.relations:
        (title,) = [fact.link for fact in site.pages[title].facts if fact.text == relation and fact.link]
    return title


def test_the_question_has_one_answer_and_no_other_start_leads_there(sites: Browse) -> None:
    """A wrong item that gave the right answer would reward not looking."""
    for index in range(200):
        site = sites.site("train", index)
        starts = [page.title for page in site.pages.values() if any(fact.text == site.start for fact in page.facts)]
        assert starts == [site.chain[0]]
        assert follow(site, starts[0]) == site.answer
        others = {follow(site, title) for title in site.pages if title.startswith("item") and title != starts[0]}
        assert site.answer not in others
        for word in site.start.split():
            assert len(site.search(word)) > 1
        assert site.search(site.start) == starts


def test_nothing_is_guessed(sites: Browse) -> None:
    """The commonest answer is right hardly more often than one name of ninety would be."""
    answers = Counter(sites.site("train", index).answer for index in range(1000))
    assert answers.most_common(1)[0][1] <= 0.02 * 1000


def test_problems_repeat_and_splits_are_disjoint(sites: Browse) -> None:
    """A held-out score over sites that were trained on is no score."""
    train = [sites.site("train", index).definition for index in range(150)]
    again, other = browse(), browse(seed=1)
    assert train == [again.site("train", index).definition for index in range(150)]
    held_out = {sites.site("eval", index).definition for index in range(150)} | {
        other.site("eval", index).definition for index in range(150)
    }
    assert not set(train) & held_out
    assert len(set(train)) == 150
    assert other.site("train", 0).definition != train[0]


# ---------------------------------------------------------------- the server


def test_another_client_finds_the_answer_by_following_links(sites: Browse) -> None:
    """The site is one that a browser could read, not something that our tools make up."""
    for index in range(20):
        site = sites.site("train", index)
        url = f"{base(sites)}/train/{index}/search?q={quote(site.start)}"
        (link,) = re.findall(r'<a href="([^"]+)">', get(url)[1])
        for relation in site.relations:
            url = urljoin(url, link)
            status, html = get(url)
            assert status == 200
            assert f"<title>{url.rpartition('/')[2]}</title>" in html
            (link,) = re.findall(rf'<li>{relation} <a href="([^"]+)">', html)
        assert link == site.answer


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/train", "/train/0", "/train/0/", "/train/0/page/", "/train/0/page/item0", "/test/0/search?q=red"),
        *("/train/-1/search", "/train/x/search", "/train/0/page/..%2f..%2f..%2fetc%2fpasswd", "/../../etc/passwd"),
        *("//etc/passwd", "/train/0/page/a/b", f"/train/{'9' * 30}/search"),
    ],
)
def test_what_is_not_there_is_404(sites: Browse, path: str) -> None:
    """A path from outside names a page that was made, or nothing."""
    assert get(base(sites) + path)[0] == 404


def test_closing_leaves_no_thread_and_no_port() -> None:
    """A hundred runs in one process would otherwise end with a hundred servers. Neither a client that just sits there nor an answer
    that takes its time holds it up."""
    before = threading.active_count()
    dataset = browse()
    assert threading.active_count() == before, "nothing is started before the first episode"

    async def main() -> None:
        await gold(dataset.env("train", 0))
        await gold(dataset.env("train", 1))

    asyncio.run(main())
    port = dataset.serve()
    with socket.create_connection(("127.0.0.1", port)):
        asyncio.run(dataset.close())
    slow = browse(latency=60)
    with socket.create_connection(("127.0.0.1", slow.serve())) as connection:
        connection.sendall(b"GET /train/0/search?q=red HTTP/1.1\r\n\r\n")
        asyncio.run(slow.close())
    deadline = time.monotonic() + 10  # the thread pool of that event loop ends by itself
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    asyncio.run(dataset.close())


def test_a_client_may_take_its_time(sites: Browse) -> None:
    """The loop that fetches also computes: seconds may pass between its connecting and its asking, and the rollout must not fail."""
    with socket.create_connection(("127.0.0.1", sites.serve())) as connection:
        time.sleep(3)
        connection.sendall(b"GET /train/0/search?q=red HTTP/1.1\r\n\r\n")
        assert connection.makefile("rb").readline().endswith(b"200 OK\r\n")


def test_a_server_that_is_gone_fails_the_episode() -> None:
    """A dead site must not look like a wrong answer of the model's."""

    async def main() -> None:
        dataset = browse()
        env = dataset.env("train", 0)
        await dataset.close()
        with pytest.raises(OSError, match="Connect call failed"):
            await env.step(called("search", query="red"))

    asyncio.run(main())


def test_waiting_for_a_page_holds_nobody_up() -> None:
    """While a slow site answers, the loop that samples for everybody goes on, and other episodes fetch too."""

    async def main() -> None:
        dataset = browse(latency=0.3)
        envs = [dataset.env("train", index) for index in range(16)]
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        clock = time.monotonic()
        await asyncio.gather(*(env.step(called("search", query="red")) for env in envs))
        seconds = time.monotonic() - clock
        ticking.cancel()
        assert ticks >= 5
        assert seconds < 16 * 0.3 / 2
        await dataset.close()

    asyncio.run(main())


# ---------------------------------------------------------------- the tools


def test_tools(sites: Browse) -> None:
    async def main() -> None:
        site = sites.site("train", 0)
        env = sites.env("train", 0)
        env.max_turns = 99
        colour, thing = site.start.split()
        item = site.chain[0]
        assert await answered(env, "find", text="x") == "error: open a page first"
        assert await answered(env, "search", query=f" {thing.upper()}  {colour}") == item
        assert item in (await answered(env, "search", query=thing)).split("; ")
        assert await answered(env, "search", query="zeppelin") == "nothing found"
        assert await answered(env, "search", query=" ") == "error: search for a few words, up to 200 characters"
        lines = (await answered(env, "open", title=item)).split("; ")
        assert lines[0] == site.start
        assert f"{site.relations[0]} [{site.chain[1]}]" in lines
        assert await answered(env, "find", text=site.relations[0].upper()) == f"{site.relations[0]} [{site.chain[1]}]"
        assert await answered(env, "find", text="zeppelin") == "nothing found"

    asyncio.run(main())


@pytest.mark.parametrize(
    "title",
    [
        *("", ".", "..", "../page/{0}", "/train/0/page/{0}", "{0}/", "{0}?", "{0}#x", "%2e%2e/{0}", "../../1/page/{1}"),
        *("/train/1/page/{1}", "http://127.0.0.1:{2}/train/1/page/{1}", "\r\nHost: x", "\x00", "\ud800", "ü", "x" * 100_000, "{1}"),
    ],
)
def test_a_title_leads_nowhere_else(sites: Browse, title: str) -> None:
    """The model writes titles; none of them reads another problem's page, or anything but a page."""
    site, other = sites.site("train", 0), sites.site("train", 1)
    title = title.format(site.chain[0], next(name for name in other.pages if name not in site.pages), sites.serve())
    env = sites.env("train", 0)
    assert asyncio.run(answered(env, "open", title=title)) == "error: no such page"
    assert asyncio.run(env.task.score(None))["pages"] == 0


@pytest.mark.parametrize("query", ["&q=red", "red#", "\r\n\r\nGET / HTTP/1.1", "\ud800", "%00", "?" * 200])
def test_a_query_is_words(sites: Browse, query: str) -> None:
    assert asyncio.run(answered(sites.env("train", 0), "search", query=query)) == "nothing found"


def test_score(sites: Browse) -> None:
    """Who answers without reading is seen, right or wrong; who never answers earns nothing."""

    async def main() -> None:
        site = sites.site("train", 0)
        blind = await sites.env("train", 0).step(said(f" {site.answer}\n"))
        assert (blind.reward, blind.metrics["unread"], blind.metrics["hops"]) == (1.0, 1.0, 0.0)
        wrong = await sites.env("train", 0).step(said(f"{site.answer} {site.answer}"))
        assert (wrong.reward, wrong.metrics["unread"]) == (0.0, 1.0)
        half = await played(sites.env("train", 0), [called("open", title=site.chain[0]), said(site.chain[1])])
        assert (half.reward, half.metrics["hops"], half.metrics["pages"]) == (0.0, 1.0, 1.0)
        env = sites.env("train", 0)
        never = await played(env, [called("open", title=site.chain[0])] * env.max_turns)
        assert never.episode_done
        assert (never.reward, never.metrics["unread"], never.metrics["pages"]) == (0.0, 0.0, 1.0)

    asyncio.run(main())


def calls(tool: str, name: str, texts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"name": st.just(tool), "arguments": st.fixed_dictionaries({name: st.text() | texts})})


CALLS = st.one_of(
    calls("search", "query", st.sampled_from(["red", "lamp", "firm"])),
    calls("open", "title", st.from_regex(r"(item|firm|town)[1-9][0-9]", fullmatch=True)),
    calls("find", "text", st.just("[")),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(actions=wild(CALLS), index=st.integers(0, 10**12))
def test_anything_may_be_said(sites: Browse, actions: list[Any], index: int) -> None:
    play_wild(sites.env("train", index), actions)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"hops": 1}, r"env\.args\.hops: 1 must be a whole number from 2 to 4"),
        ({"hops": "2"}, r"env\.args\.hops: '2' must be"),
        ({"hops": True}, r"env\.args\.hops: True must be"),
        ({"entities": 61}, r"env\.args\.entities: 61 must be"),
        ({"facts": -1}, r"env\.args\.facts: -1 must be"),
        ({"latency": -0.1}, r"env\.args\.latency: -0\.1 must be seconds from 0 to 60"),
        ({"latency": float("nan")}, r"env\.args\.latency: nan must be"),
    ],
)
def test_a_users_mistake_is_one_line(args: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_env("browse", args)


def test_careful_succeeds_and_careless_mostly_does_not(sites: Browse) -> None:
    """Demonstrations of a careful way that fails, or of a careless way that works, would teach the base the wrong thing."""
    scripts = recipe("worlds_docs")

    async def main() -> None:
        careful = await scripts.measure(sites, scripts.CAREFUL["browse"], 100)
        careless = await scripts.measure(sites, scripts.CARELESS["browse"], 100)
        assert sum(careful["reward"]) == 100
        assert max(careful["tool_errors"]) == 1, "slips are among them"
        assert sum(careless["reward"]) <= 25

    asyncio.run(main())
