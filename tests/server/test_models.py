"""Several models: by name and alias, loaded on demand, shared, evicted when idle and never when busy (figure 11)."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from octavo.cli.serve import split_name
from octavo.errors import NotEnoughMemoryError, UsageError
from octavo.server.models import ServedModel


def named(served, name: str, options: str = "", aliases: tuple[str, ...] = ()):
    model = served(name, f"fake?name={name}&{options}")
    return ServedModel(name, aliases, model.settings, model.sampling)


def state(harness, name: str) -> str:
    return harness.service.models.state(name)


def test_models_answer_under_their_names_and_aliases(serving, served):
    with serving(named(served, "a", aliases=("first", "org/a")), named(served, "b")) as harness:
        prints = {}
        for name in ("a", "first", "org/a", "b"):
            answer = harness.chat("x!stop", model=name).json()
            prints[name] = answer["model"], answer["system_fingerprint"]
        assert prints["a"] == prints["first"] == prints["org/a"]
        assert prints["a"][0] == "a"
        assert prints["b"] != prints["a"]
        ids = [each["id"] for each in harness.client.get("/v1/models").json()["data"]]
        assert ids == ["a", "b"]
        shown = harness.client.get("/v1/models/org/a").json()
        assert (shown["id"], shown["state"]) == ("a", "ready")
        assert shown["limits"]["context_tokens"] == 512
        assert harness.client.get("/v1/models/c").status_code == 404


def test_notices_of_a_load_are_logged_and_shown(serving, served, caplog):
    with (
        serving(named(served, "a", "notice=made+again+in+/home/me/x")) as harness,
        caplog.at_level("WARNING"),
    ):
        harness.wait_ready()
        (notice,) = harness.client.get("/v1/models/a").json()["notices"]
    assert notice.startswith("made again in ")
    assert "/home" not in notice
    assert f"model a: {notice}" in caplog.messages


def test_a_load_is_shared_and_survives_who_asked_for_it(serving, served):
    with serving(named(served, "a"), named(served, "b", "load_s=0.5")) as harness:
        with pytest.raises(httpx.TimeoutException):
            harness.client.post(
                "/v1/completions", json={"model": "b", "prompt": "x", "max_tokens": 1}, timeout=0.1
            )
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda n: harness.complete("x", model="b", max_tokens=1), range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert harness.service.models._entries["b"].loads == 1


def test_the_least_recently_used_idle_model_makes_room(serving, served):
    models = [named(served, name, "needed=400") for name in "abc"]
    with serving(*models, memory_bytes=1000) as harness:
        for name in ("a", "b", "a", "c"):
            assert harness.complete("x", model=name, max_tokens=1).status_code == 200
        assert [state(harness, name) for name in "abc"] == ["ready", "unloaded", "ready"]
        assert harness.service.models.evictions == 1


def test_only_as_many_bytes_as_needed_are_freed(serving, served):
    models = [
        named(served, "big", "needed=600"),
        named(served, "small", "needed=300"),
        named(served, "third", "needed=350"),
    ]
    with serving(*models, memory_bytes=1000) as harness:
        for name in ("big", "small", "third"):
            assert harness.complete("x", model=name, max_tokens=1).status_code == 200
        assert [state(harness, name) for name in ("big", "small", "third")] == ["unloaded", "ready", "ready"]


def test_a_busy_model_is_waited_for(serving, served):
    models = [named(served, name, "needed=600") for name in "ab"]
    with serving(*models, memory_bytes=1000) as harness, ThreadPoolExecutor(3) as threads:
        harness.wait_ready()
        busy = threads.submit(harness.chat, "!slow:50 xxxxxxxxxx!stop", model="a")
        time.sleep(0.3)
        other = threads.submit(harness.complete, "x", model="b", max_tokens=1)
        time.sleep(0.3)
        assert state(harness, "a") == "ready"
        # Whoever comes for the busy one now waits behind: or b's turn would never come.
        late = threads.submit(harness.complete, "y", model="a", max_tokens=1)
        assert busy.result().json()["choices"][0]["finish_reason"] == "stop"
        assert other.result().status_code == 200
        assert late.result().status_code == 200


def test_a_model_that_never_fits_is_refused(serving, served):
    models = [
        named(served, "a", "needed=400"),
        named(served, "b", "needed=2000"),
        named(served, "c", "needed=9&room=5"),
    ]
    with serving(*models, memory_bytes=1000) as harness:
        assert harness.complete("x", model="a", max_tokens=1).status_code == 200
        for name in "bc":
            response = harness.complete("x", model=name, max_tokens=1)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "not_enough_memory")
        assert harness.complete("x", model="a", max_tokens=1).status_code == 200


def test_a_model_that_never_fits_costs_nobody_their_place(serving, served):
    """What all others hold is less than it lacks: neither an idle nor a busy one has to go."""
    models = [
        named(served, "a", "needed=10"),
        named(served, "b", "needed=10"),
        named(served, "big", "needed=100&room=50"),
    ]
    with serving(*models) as harness, ThreadPoolExecutor(1) as threads:
        for name in "ab":
            assert harness.complete("x", model=name, max_tokens=1).status_code == 200
        assert harness.complete("x", model="big", max_tokens=1).status_code == 503
        assert [state(harness, name) for name in ("a", "b", "big")] == ["ready", "ready", "failed"]
        busy = threads.submit(harness.chat, "!slow:400 xxxxxxxxxxxxxxxxxxxx", model="a")
        time.sleep(0.3)
        began = time.perf_counter()
        assert harness.complete("x", model="big", max_tokens=1).status_code == 503
        assert time.perf_counter() - began < 10  # a worker's start: the busy one is not waited for
        assert not busy.done()
        assert busy.result().status_code == 200
        assert harness.service.models.evictions == 0


def test_of_two_busy_models_one_makes_room_and_both_keep_one_worker(serving, served, wait_until):
    models = [named(served, name, "needed=400") for name in "abc"]
    with serving(*models, memory_bytes=1000) as harness, ThreadPoolExecutor(4) as threads:
        for name in "ab":
            assert harness.complete("x", model=name, max_tokens=1).status_code == 200
        busy = [
            threads.submit(harness.chat, f"!slow:{pace} xxxxxxxxxxxxxxxxxxxx!stop", model=name)
            for name, pace in (("a", 20), ("a", 60), ("b", 90))
        ]
        wait_until(lambda: [harness.engine(name)["running"] for name in "ab"] == [2, 1])
        other = threads.submit(harness.complete, "x", model="c", max_tokens=1)
        assert [each.result().status_code for each in (*busy, other)] == [200] * 4
        assert harness.complete("x", model="b", max_tokens=1).status_code == 200
        entries = harness.service.models._entries
        assert [entries[name].loads for name in "abc"] == [1, 1, 1]
        assert not any(entry.retiring for entry in entries.values())
        assert harness.service.models.evictions == 1


def test_a_load_that_dies_while_it_waits_for_room_takes_its_claim_along(serving, served, wait_until):
    models = [named(served, name, "needed=600") for name in "ab"]
    with serving(*models, memory_bytes=1000) as harness, ThreadPoolExecutor(2) as threads:
        harness.wait_ready()
        busy = threads.submit(harness.chat, "!slow:200 " + "x" * 30, model="a")
        wait_until(lambda: harness.engine("a")["running"])
        waiting = threads.submit(harness.complete, "x", model="b", max_tokens=1)
        entries = harness.service.models._entries
        wait_until(lambda: entries["a"].retiring)
        os.kill(entries["b"].link.pid, signal.SIGKILL)
        assert waiting.result().status_code == 503
        assert not entries["a"].retiring
        # While the first is still being answered, another of the same model is not made to wait.
        assert harness.complete("y", model="a", max_tokens=1).status_code == 200
        assert busy.result().status_code == 200
        assert entries["a"].loads == 1
        assert harness.complete("x", model="b", max_tokens=1).status_code == 200


def test_an_idle_model_is_unloaded_and_comes_back(serving, served, wait_until):
    with serving(named(served, "a"), idle_unload_seconds=2) as harness:
        harness.wait_ready()
        pid = harness.service.models.resident("a").link.pid
        wait_until(lambda: state(harness, "a") == "unloaded")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert harness.client.get("/ready").status_code == 200
        assert harness.complete("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "count", [80, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])]
)
def test_no_answer_comes_from_another_model(serving, served, count):
    """Figure 11: four models, room for two, requests for all of them at once."""
    models = [named(served, name, "needed=400") for name in "abcd"]
    with serving(*models, memory_bytes=1000) as harness:
        fingerprints: dict[str, set[str]] = {}

        async def main() -> None:
            pick = random.Random(3)
            names = [pick.choice("abcd") for _ in range(count)]
            places = asyncio.Semaphore(32)
            async with httpx.AsyncClient(base_url=harness.url, timeout=300, trust_env=False) as client:

                async def one(number: int, name: str) -> None:
                    body = {"model": name, "messages": [{"role": "user", "content": f"{name}{number}!stop"}]}
                    async with places:
                        answer = (await client.post("/v1/chat/completions", json=body)).json()
                    assert answer["choices"][0]["message"]["content"] == f"{name}{number}!stop"
                    assert answer["model"] == name
                    fingerprints.setdefault(name, set()).add(answer["system_fingerprint"])

                waiting = [asyncio.create_task(one(number, name)) for number, name in enumerate(names)]
                await asyncio.gather(*waiting)

        asyncio.run(main())
        assert all(len(found) == 1 for found in fingerprints.values())
        assert len(set.union(*fingerprints.values())) == 4
        resident = [name for name in "abcd" if harness.service.models.resident(name)]
        assert len(resident) <= 2


@pytest.mark.parametrize(
    ("given", "names", "model"),
    [
        (None, (), None),
        ("org/name", (), "org/name"),
        ("a=org/name", ("a",), "org/name"),
        ("a,b=/path/x.gguf", ("a", "b"), "/path/x.gguf"),
    ],
)
def test_names_on_the_command_line(given, names, model):
    assert split_name(given) == (names, model)


@pytest.mark.parametrize("given", ["=x", "a=", ",b=x"])
def test_a_name_without_a_model_is_refused(given):
    with pytest.raises(UsageError):
        split_name(given)


def test_an_only_model_that_can_never_load_ends_the_server(serving, served):
    with (
        pytest.raises(NotEnoughMemoryError),
        serving(served(model="fake?needed=100&room=50")) as harness,
    ):
        harness.chat("x")


@pytest.mark.parametrize("more", [{"preload": False}, {"others": True}])
def test_one_of_several_or_on_demand_it_stays_up_and_says_so(serving, served, wait_until, more):
    bad = served(model="fake?needed=100&room=50")
    models = [bad, named(served, "b")] if more.pop("others", False) else [bad]
    with serving(*models, **more) as harness:
        response = harness.chat("x")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_enough_memory")
        ready = harness.client.get("/ready").json()
        assert ready["models"]["fake"] == {"state": "failed", "code": "not_enough_memory"}
        if len(models) > 1:
            assert harness.complete("x", model="b", max_tokens=1).status_code == 200
            assert harness.client.get("/ready").status_code == 200


def test_an_internal_error_of_a_load_does_not_end_the_server(serving, served, wait_until):
    """It may go away: a worker that was killed by chance, say."""
    with serving(served(model="fake?fails=1")) as harness:
        wait_until(lambda: state(harness, "fake") == "failed")
        assert harness.client.get("/health").status_code == 200


def test_a_fallback_answers_under_the_same_name_and_is_announced(serving, served):
    small = served(model="fake?name=small", context=300)
    big = dataclasses.replace(served(model="fake?needed=100&room=50"), fallback=small)
    with serving(big) as harness:
        harness.wait_ready()
        assert harness.chat("hello!stop").json()["model"] == "fake"
        card = harness.client.get("/v1/models/fake").json()
        assert card["limits"]["context_tokens"] == 300
        assert card["notices"][0].startswith("too large: the fallback fake?name=small answers")


def test_where_the_last_fallback_fails_its_error_is_the_error(serving, served):
    small = served(model="fake?needed=90&room=50")
    big = dataclasses.replace(served(model="fake?needed=100&room=50"), fallback=small)
    with serving(big, preload=False) as harness:
        assert harness.chat("x").json()["error"]["code"] == "not_enough_memory"
        assert state(harness, "fake") == "failed"


def test_a_disk_that_is_full_stops_one_load_and_nothing_else(serving, served):
    """Figure 16 at the server; what is written, and what is left of it, is tests/weights/test_cache_faults.py's."""
    with serving(named(served, "a"), served("full", "fake?disk=1")) as harness:
        harness.wait_ready()
        for _ in range(2):
            assert harness.complete("x", model="a", max_tokens=1).status_code == 200
            error = harness.complete("x", model="full", max_tokens=1)
            assert (error.status_code, error.json()["error"]["code"]) == (503, "not_enough_memory")
        assert harness.client.get("/ready").json()["models"]["full"]["code"] == "not_enough_disk"
