"""A gateway and its replicas, over real connections, on fake engines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import AdapterUnfit
from adapters.model import Version
from server.fleet import internal, wire
from server.fleet.internal import RelayedCall
from server.inference import long_documents
from tests.support import tiny
from tests.support.fakes import Times
from tests.support.fleet import FLEET_KEY, Fleet, fleet
from tests.support.fleet_answers import CHAT, body, paths, read, told, two, usage
from tests.support.site import bearer

__all__ = ["two"]


class TestAnswering:
    async def test_a_gateway_says_what_its_replicas_are(self, two: Fleet) -> None:
        found = (await two.gateway.admin.get("/admin/v1/server")).json()
        assert found["parsers"] == {
            "tool_parser": "hermes",
            "reasoning_parser": None,
            "tools_shown": True,
            "tools_guessed": False,
        }

    async def test_one_gateway_runs_a_batch(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        asked = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        lines = [
            json.dumps({"custom_id": f"r{n}", "method": "POST", "url": CHAT, "body": asked}) for n in range(8)
        ]
        async with two.gateway.openai(key) as client:
            file = await client.files.create(file="\n".join(lines).encode(), purpose="batch")
            batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            async with asyncio.timeout(120):
                while (batch := await client.batches.retrieve(batch.id)).status != "completed":
                    await asyncio.sleep(0.1)
            assert batch.output_file_id is not None
            answers = (await client.files.content(batch.output_file_id)).text.splitlines()
        assert [json.loads(one)["custom_id"] for one in answers] == [f"r{n}" for n in range(8)]
        runner = two.gateway.services.batches
        replicas = runner._fleet.replicas
        assert await replicas.hold(batch.id, "another gateway", 0), "it was given up when it had ended"
        await asyncio.sleep(0.01)
        assert await runner._fleet.hold(batch.id)
        assert not await replicas.hold(batch.id, "another gateway", 1), "nobody else takes it meanwhile"
        await runner.stop()
        assert await replicas.hold(batch.id, "another gateway", 1), "nobody waits for one that has stopped"

    async def test_uploads_and_answers_pass_through_the_gateway(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        answer = await two.gateway.chat(key, "hello", model="a", max_tokens=3)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert answer.headers["X-Loraplex-Version"] == "a@1"
        assert (await two.gateway.http.get("/v1/models", headers=bearer(key))).json()["data"]
        said, counted = told(await read(two.gateway, key, body()))
        assert said
        assert counted == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
        (row,) = await usage(two)
        assert (row["requests"], row["output_tokens"]) == (2, 23)

    async def test_an_operator_takes_a_version_out_of_service_of_which_one_runs(self, two: Fleet) -> None:
        """What a replica has begun goes on to its end."""
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        reading = asyncio.create_task(read(two.gateway, key, body(100)))
        async with asyncio.timeout(60):
            while not two.gateway.services.dispatcher.open_leases():
                await asyncio.sleep(0.01)
        url = "/admin/v1/tenants/acme/adapters/a/versions/1"
        change = {"quarantined": True, "reason": "it is bad"}
        assert (await two.gateway.admin.patch(url, json=change)).status_code == 200
        refused = await two.gateway.chat(key, "hello", model="a", max_tokens=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_quarantined")
        assert told(await reading)[1]["completion_tokens"] == 100

    async def test_a_cold_request_says_how_long_its_load_took(self, tmp_path: Path) -> None:
        """A gateway's row of it, and so its access line and trace, know what a replica has waited for."""
        times = Times(stage=0.05, activate=0.02, step=0.005)
        async with fleet(tmp_path, 1, times, gpu_slots=1, host_slots=1) as one:
            key = await one.gateway.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
            for model in ("a", "b", "b"):
                assert (await one.gateway.chat(key, "hi", model=model, max_tokens=1)).status_code == 200
            await one.gateway.services.usage_writer.flush()
            again, b, a = (await one.gateway.admin.get("/admin/v1/requests")).json()["data"]
            for row in (a, b):
                assert row["cold"]
                assert 0.07 <= row["load_seconds"] <= row["queue_seconds"]
            assert (again["cold"], again["load_seconds"]) == (False, 0)

    async def test_a_replica_works_in_the_trace_of_the_gateway(
        self, two: Fleet, caplog: pytest.LogCaptureFixture
    ) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        caplog.set_level("DEBUG", "loraplex.access")
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        headers = bearer(key) | {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        sent = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        assert (await two.gateway.http.post(CHAT, json=sent, headers=headers)).status_code == 200
        await two.until(lambda: len(paths(caplog, trace)) > 1)
        assert any(path.startswith("POST /internal/") for path in paths(caplog, trace))
        assert f"POST {CHAT}" in paths(caplog, trace)

    async def test_it_is_ready_and_says_how_its_replicas_are(self, two: Fleet) -> None:
        ready = await two.gateway.http.get("/ready")
        assert ready.status_code == 200, ready.text
        found = (await two.gateway.admin.get("/admin/v1/replicas")).json()["data"]
        assert {one["id"] for one in found} == {one.id for one in two.replicas}
        assert {one["state"] for one in found} == {"ready"}
        page = (await two.gateway.http.get("/metrics")).text
        assert page.count("loraplex_replica_up{") == 2

    async def test_errors_are_those_of_one_process(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        for sent, code in (
            (body(model="nobody"), "model_not_found"),
            (body(colour="red"), "unknown_field"),
            (body(temperature=9), "invalid_request"),
            (body(n=99), "invalid_request"),
        ):
            response = await two.gateway.http.post(CHAT, json=sent, headers=bearer(key))
            assert response.json()["error"]["code"] == code, response.text
        long = body(messages=[{"role": "user", "content": "word " * 600}])
        response = await two.gateway.http.post(CHAT, json=long, headers=bearer(key))
        assert response.status_code == 400, response.text

    async def test_a_refused_upload_says_why(self, two: Fleet) -> None:
        await two.gateway.tenant("acme")
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"no"}
        refused = await two.gateway.admin.post("/admin/v1/tenants/acme/adapters/a/versions", files=files)
        assert refused.status_code == 422, refused.text
        wrong = {"a.txt": b"{}"}
        refused = await two.gateway.admin.post("/admin/v1/tenants/acme/adapters/a/versions", files=wrong)
        assert refused.status_code == 422, refused.text

    async def test_tokens_warm_and_verify_are_asked_of_a_replica(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        counted = await two.gateway.http.post("/tokenize", json={"prompt": "one two"}, headers=bearer(key))
        assert counted.json()["count"] == 3, counted.text
        warmed = await two.gateway.admin.post("/admin/v1/tenants/acme/adapters/a/warm", json={"slot": True})
        assert warmed.json()["tier"] == "gpu", warmed.text
        await two.until(
            lambda: any("acme/a@" in key for one in two.directory.all() for key in one.said["in_slots"])
        )
        shown = (await two.gateway.admin.get("/admin/v1/tenants/acme/adapters/a")).json()
        assert shown["tier"] == "gpu"

    async def test_a_client_that_leaves_ends_it_in_the_engine_and_pays_for_what_ran(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        async with two.gateway.http.stream("POST", CHAT, json=body(400), headers=bearer(key)) as answer:
            chunks = answer.aiter_text()
            for _ in range(3):
                await anext(chunks)
            engine = two.busy().engine
        await two.until(lambda: not engine.running)
        await two.until(lambda: not two.gateway.services.dispatcher.open_leases())
        (row,) = await usage(two)
        assert (row["outcome"], row["prompt_tokens"]) == ("disconnected", 3)
        assert 2 <= row["output_tokens"] < 40

    async def test_a_client_that_leaves_while_it_waits(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)}, max_running=1)

        def held() -> int:
            return sum(len(one.services.dispatcher._leases) for one in two.replicas)

        gateway = two.gateway.services.dispatcher
        running = asyncio.create_task(read(two.gateway, key, body(400)))
        await two.until(lambda: held() == 1)
        waiting = asyncio.create_task(read(two.gateway, key, body(60)))
        await two.until(lambda: gateway.snapshot().queued == {"acme": 1})
        assert held() == 1, "its customer's place is taken"
        waiting.cancel()
        await two.until(lambda: not gateway.snapshot().queued)
        assert held() == 1
        running.cancel()
        await two.until(lambda: held() == 0)
        await two.until(lambda: not any(one.app.state.replica.calls for one in two.replicas))


class TestResidency:
    async def test_a_gateway_shows_slots_memory_and_queues_of_all_replicas(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)}, max_running=1)
        answers = [asyncio.create_task(read(two.gateway, key, body(400, model="a"))) for _ in range(3)]
        await two.until(lambda: sum(len(one.services.dispatcher._leases) for one in two.replicas) == 1)
        await two.until(lambda: two.gateway.services.dispatcher.snapshot().queued == {"acme": 2})
        await two.until(lambda: any(one.engine.running for one in two.replicas))
        snapshots = [one.services.dispatcher.snapshot() for one in two.replicas]
        found = (await two.gateway.admin.get("/admin/v1/residency")).json()
        for answer in answers:
            answer.cancel()
        slots = [slot for one in snapshots for slot in one.slots]
        assert len(found["slots"]) == len(slots)
        assert {slot["replica"] for slot in found["slots"]} == {one.id for one in two.replicas}
        named = {(slot["tenant"], slot["name"]) for slot in found["slots"] if slot["version"]}
        assert named == {("acme", "a@1")}
        assert {(entry["tenant"], entry["name"], entry["tier"]) for entry in found["host"]} >= {
            ("acme", "a@1", "gpu")
        }
        assert (found["running"], found["queued"]) == ({"acme": 1}, {"acme": 2})
        parts = {one["id"]: one for one in found["replicas"]}
        assert set(parts) == {one.id for one in two.replicas}
        assert all(one["answered"] and one["state"] == "ready" for one in parts.values())
        assert sum(one["running"] + one["queued"] for one in parts.values()) == 1
        assert {one["gpu_slots"] for one in parts.values()} == {len(snapshots[0].slots)}

    async def test_limits_show_what_waits_and_runs_at_replicas(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)}, max_running=1)
        for one in two.replicas:
            one.engine.times.step = 0.2
        answers = [asyncio.create_task(read(two.gateway, key, body(400, model="a"))) for _ in range(3)]
        counted: set[int] = set()
        async with asyncio.timeout(60):
            while 3 not in counted:
                await asyncio.sleep(0.05)
                now = (await two.gateway.admin.get("/admin/v1/tenants/acme/limits")).json()
                counted.add(now["queued"] + now["running"] if now["queued"] else 0)
        for answer in answers:
            answer.cancel()

    async def test_events_are_those_of_each_replica(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        await two.gateway.chat(key, "hello", model="a", max_tokens=3)
        path = "/admin/v1/residency"
        assert "events" not in (await two.gateway.admin.get(path)).json()
        for one in two.replicas:
            asked = {"replica": one.id, "events": 8192}
            found = (await two.gateway.admin.get(path, params=asked)).json()
            assert [each["id"] for each in found["replicas"]] == [one.id]
            assert {slot["replica"] for slot in found["slots"]} == {one.id}
            names = [event["event"] for event in found["events"]]
            theirs = [event["event"] for event in one.services.dispatcher.last_events(8192)]
            assert names == theirs[: len(names)], "more may have come since"
            assert all(event["replica"] == one.id for event in found["events"])
        every = (await two.gateway.admin.get(path, params={"events": 8192})).json()["events"]
        assert "submitted" in [event["event"] for event in every]
        unknown = await two.gateway.admin.get(path, params={"replica": "nobody"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "replica_not_found")

    async def test_one_that_does_not_answer_is_shown_as_such(self, two: Fleet) -> None:
        gone, there = two.replicas
        await gone.kill()
        await two.until(lambda: any(one.lost for one in two.directory.all()))
        found = (await two.gateway.admin.get("/admin/v1/residency")).json()
        assert {slot["replica"] for slot in found["slots"]} == {there.id}
        parts = {one["id"]: one for one in found["replicas"]}
        assert (parts[gone.id]["state"], parts[gone.id]["answered"]) == ("lost", False)
        assert (parts[gone.id]["running"], parts[gone.id]["rates"]) == (None, None)
        assert (parts[there.id]["state"], parts[there.id]["answered"]) == ("ready", True)

    async def test_one_that_hangs_keeps_nobody_from_seeing_the_others(self, two: Fleet) -> None:
        hung, there = two.replicas
        hung.freeze()
        found = (await two.gateway.admin.get("/admin/v1/residency")).json()
        assert {one["id"]: one["answered"] for one in found["replicas"]} == {hung.id: False, there.id: True}
        assert {slot["replica"] for slot in found["slots"]} == {there.id}

    async def test_it_comes_as_a_stream(self, two: Fleet) -> None:
        await two.gateway.tenant("acme")
        seen: list[dict[str, Any]] = []
        asked = {"params": {"every": 0.2}, "headers": {"Accept": "text/event-stream"}}
        async with two.gateway.admin.stream("GET", "/admin/v1/residency", **asked) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line.removeprefix("data: ")))
                    if len(seen) == 1:
                        await two.gateway.upload("acme", "b", tiny.adapter(2))
                    elif "b@1" in {entry["name"] for entry in seen[-1]["host"]}:
                        break
        assert {one["id"] for one in seen[0]["replicas"]} == {one.id for one in two.replicas}


class TestLongDocuments:
    """Embeddings of many inputs, which would stall every stream if they were written or read at once."""

    INPUTS = tuple(f"text {i}" for i in range(600))

    @pytest.fixture
    async def pooling(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
        monkeypatch.setattr(wire, "MAX_FRAME", 64 << 10)  # instead of documents of 64 MiB
        monkeypatch.setattr(long_documents, "PART_BYTES", 16 << 10)
        monkeypatch.setattr(long_documents, "LONG", 1000)
        base = replace(tiny.base(), pooling=True)
        async with fleet(tmp_path, times=Times(step=0.001), base=base) as made:
            yield made

    async def test_they_pass_a_gateway_in_parts_and_are_read_where_it_needs_them(
        self, pooling: Fleet
    ) -> None:
        key = await pooling.gateway.tenant("acme", {"a": tiny.adapter(1)})
        asked = {"model": "a", "input": self.INPUTS}
        answer = await pooling.gateway.http.post("/v1/embeddings", json=asked, headers=bearer(key))
        assert answer.status_code == 200, answer.text
        assert len(answer.content) == int(answer.headers["content-length"]) > wire.MAX_FRAME
        data = answer.json()["data"]
        assert [one["index"] for one in data] == list(range(600))
        one = {"model": "a", "input": self.INPUTS[321]}
        alone = await pooling.gateway.http.post("/v1/embeddings", json=one, headers=bearer(key))
        assert data[321]["embedding"] == alone.json()["data"][0]["embedding"]
        asked = {"model": "a", "query": "text 7", "documents": self.INPUTS}
        answer = await pooling.gateway.http.post("/v1/rerank", json=asked, headers=bearer(key))
        assert answer.status_code == 200, answer.text
        assert answer.json()["results"][0]["relevance_score"] == pytest.approx(1)
        assert len(answer.json()["results"]) == 600
        (row,) = await usage(pooling)
        assert (row["outcome"], row["requests"]) == ("completed", 3)

    async def test_a_replica_that_dies_in_the_middle_leaves_none_of_its_parts(
        self, pooling: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = await pooling.gateway.tenant("acme", {"a": tiny.adapter(1)})
        asked = {"model": "a", "input": self.INPUTS}
        whole = await pooling.gateway.http.post("/v1/embeddings", json=asked, headers=bearer(key))
        tell, said = RelayedCall.tell, [0]

        async def dying(self: RelayedCall, framed: bytes) -> None:
            await tell(self, framed)
            said[0] += framed[4] == wire.Kind.BODY
            if said[0] == 3:
                said[0] += 1
                await next(r for r in pooling.replicas if r.app.state.replica is self._replica).kill()

        monkeypatch.setattr(RelayedCall, "tell", dying)
        again = await pooling.gateway.http.post("/v1/embeddings", json=asked, headers=bearer(key))
        assert said[0] > 3
        assert again.status_code == 200, again.text
        assert again.json()["data"] == whole.json()["data"]
        (row,) = await usage(pooling)
        assert (row["outcome"], row["requests"]) == ("completed", 2)

    async def test_what_no_frame_holds_is_an_error_and_no_loss(
        self, pooling: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a replica of the release before sends it."""
        monkeypatch.setattr(internal, "is_long", lambda body: False)
        key = await pooling.gateway.tenant("acme", {"a": tiny.adapter(1)})
        before = [len(one.engine.calls) for one in pooling.replicas]
        asked = {"model": "a", "input": self.INPUTS}
        answer = await pooling.gateway.http.post("/v1/embeddings", json=asked, headers=bearer(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error"), answer.text
        asked_of = [len(one.engine.calls) > was for one, was in zip(pooling.replicas, before, strict=True)]
        assert sorted(asked_of) == [False, True], "another one would answer the same"
        assert not any(one.lost for one in pooling.directory.all())


class TestCheck:
    async def test_a_gateway_says_what_any_replica_does_not_serve(
        self, two: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await two.gateway.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        found = (await two.gateway.admin.get("/admin/v1/check")).json()
        assert (found["ok"], found["unfit"], found["versions"]) == (True, [], 2)

        def problem(version: Version) -> AdapterUnfit | None:
            return AdapterUnfit("of another base") if version.adapter == "b" else None

        for one in two.replicas:
            monkeypatch.setattr(one.services.publishing.fitness, "problem", problem)
        found = (await two.gateway.admin.get("/admin/v1/check")).json()
        assert not found["ok"]
        (one,) = found["unfit"]
        assert (one["tenant"], one["adapter"], one["version"]) == ("acme", "b", 1)
        assert (one["code"], one["message"]) == ("adapter_unfit", "of another base")

    async def test_nothing_is_said_for_replicas_that_are_gone(self, two: Fleet) -> None:
        for replica in two.replicas:
            await replica.kill()
        answer = await two.gateway.admin.get("/admin/v1/check")
        assert answer.status_code == 503, answer.text


class TestKeys:
    async def test_a_replica_answers_nobody_else(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{two.replicas[0].port}", timeout=60
        ) as client:
            assert (await client.post(CHAT, json=body(), headers=bearer(key))).status_code == 404
            assert (await client.get("/admin/v1/tenants")).status_code == 404
            assert (await client.get("/internal/v1/state")).status_code == 401
            assert (await client.get("/internal/v1/state", headers=bearer("x" * 20))).status_code == 401
            assert (await client.post("/internal/v1/open", content=b"{}")).status_code == 401
            assert (await client.get("/internal/v1/state", headers=bearer(FLEET_KEY))).status_code == 200
            wrong = await client.post("/internal/v1/open", content=b"{}", headers=bearer(FLEET_KEY))
            assert wrong.status_code == 400
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 200
        assert (
            await two.gateway.http.get("/internal/v1/state", headers=bearer(FLEET_KEY))
        ).status_code == 404


class TestLimits:
    async def test_a_prompt_larger_than_it_seemed_is_reserved_anew(self, two: Fleet) -> None:
        """One letter a word: more tokens than a third of the bytes."""
        limits = {"tokens_per_minute": 150}
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)}, limits=limits)
        dense = body(20, messages=[{"role": "user", "content": "a " * 90}])
        text = await read(two.gateway, key, dense)
        assert told(text)[1] == {"prompt_tokens": 91, "completion_tokens": 20, "total_tokens": 111}
        again = await two.gateway.http.post(CHAT, json=dense, headers=bearer(key))
        assert again.status_code == 429, again.text
        assert not any(one.engine.running for one in two.replicas)
        small = await two.gateway.http.post(CHAT, json=body(5), headers=bearer(key))
        assert small.status_code == 200
        assert small.headers["x-ratelimit-remaining-tokens"]

    async def test_what_was_reserved_is_lowered_to_what_was_counted(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)}, limits={"tokens_per_minute": 120})
        text = body(10, messages=[{"role": "user", "content": "extraordinarily " * 18}])
        first = await two.gateway.http.post(CHAT, json=text, headers=bearer(key))
        assert first.status_code == 200, first.text  # reserved 106, used 29
        second = await two.gateway.http.post(CHAT, json=text, headers=bearer(key))
        assert second.status_code == 429 or re.search("DONE", second.text)
