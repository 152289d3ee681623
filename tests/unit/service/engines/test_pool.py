"""One process for each base, as many as memory allows, none for long without work."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from core.models.load import load
from service.engines.base import EngineError, Request, Sampling
from service.engines.child import log_name
from service.engines.options import EngineOptions, PoolOptions
from service.engines.pool import OVERHEAD, EnginePool, needs_merge, weights_bytes
from tests.unit.service.engines.conftest import Kit, make_adapter, run

GREEDY = Sampling(temperature=0, max_tokens=8, logprobs=0)


async def answer(pool: EnginePool, request: Request) -> str:
    return "".join([chunk.text async for chunk in pool.generate(request)])


def whole(text: str) -> str:
    return text.rstrip("\ufffd")


def run_plain(kit: Kit) -> str:
    return run(kit.scheduler(), [kit.request("1", "the order", sampling=GREEDY)])["1"].text


def generate(kit: Kit, adapter: str) -> str:
    """What transformers' own generate makes with the adapter not merged."""
    loaded = load(kit.base, adapter=Path(adapter))
    ids = loaded.tokenizer("the order", return_tensors="pt")
    made = loaded.model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(loaded.tokenizer.decode(made, skip_special_tokens=True))


async def test_bases_share_the_memory_and_a_dora_adapter_is_served_merged(llama: Kit, tmp_path: Path) -> None:
    dora = make_adapter(llama.base, tmp_path / "dora", 3, use_dora=True)
    assert needs_merge(Path(dora)) and not needs_merge(Path(llama.adapters[0]))
    merged = Request("2", llama.base, "the order", adapter=dora, sampling=GREEDY)
    room = int(1.5 * (OVERHEAD + weights_bytes(Path(llama.base))))
    pool = EnginePool(EngineOptions(threads=1, log_directory=tmp_path), PoolOptions(memory_bytes=room, idle_seconds=2))
    try:
        stream = pool.generate(Request("1", llama.base, "the order", sampling=replace(GREEDY, max_tokens=900)))
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineError) as full:
            await answer(pool, merged)
        assert full.value.status == 503 and full.value.retry_after is not None, "a busy process is not pushed out"
        await waiting
        await stream.aclose()

        text = await answer(pool, merged)
        health = await pool.health()
        assert [engine["starts"] for engine in health["engines"]] == [1], "the idle process made room"
        assert health["in_flight"] == 0 and health["memory_bytes"] > 0
        assert whole(text) == whole(generate(llama, dora)) != whole(run_plain(llama))

        for _ in range(400):
            if not (await pool.health())["engines"]:
                break
            await asyncio.sleep(0.02)
        assert (await pool.health())["engines"] == [], "an idle process ends"
    finally:
        await pool.close()
    with pytest.raises(EngineError) as closed:
        await answer(pool, merged)
    assert closed.value.status == 503


async def test_a_deleted_models_idle_process_ends_at_once(llama: Kit, tmp_path: Path) -> None:
    dora = make_adapter(llama.base, tmp_path / "dora", 3, use_dora=True)
    pool = EnginePool(EngineOptions(threads=1))
    try:
        await answer(pool, Request("1", llama.base, "the order", adapter=dora, sampling=GREEDY))
        await pool.drop("/another")
        assert len((await pool.health())["engines"]) == 1
        stream = pool.generate(Request("2", llama.base, "x", adapter=dora, sampling=replace(GREEDY, max_tokens=900)))
        await anext(stream)
        await pool.drop(dora)
        assert len((await pool.health())["engines"]) == 1, "who is being answered is answered"
        await stream.aclose()
        await pool.drop(dora)
        assert (await pool.health())["engines"] == []
        await answer(pool, Request("3", llama.base, "the order", sampling=GREEDY))
        await pool.drop(llama.base)
        assert (await pool.health())["engines"] == []
    finally:
        await pool.close()


async def test_a_model_larger_than_the_limit_is_refused_with_both_numbers(llama: Kit) -> None:
    pool = EnginePool(EngineOptions(threads=1), PoolOptions(memory_bytes=1 << 20))
    with pytest.raises(EngineError) as large:
        await answer(pool, Request("1", llama.base, "x"))
    assert (large.value.status, large.value.code) == (400, "model_too_large") and "1 MiB" in large.value.message
    await pool.close()


def test_what_is_no_adapter_is_left_for_the_process_to_refuse(tmp_path: Path) -> None:
    assert not needs_merge(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    assert not needs_merge(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert not needs_merge(tmp_path)


def test_every_model_has_a_log_of_its_own() -> None:
    """All whole weights that jobs make lie in folders of the same name."""
    jobs = [f"/home/jobs/ftjob-{letter * 24}" for letter in "AB"]
    places = [f"{job}/{inside}" for job in jobs for inside in ("artifact", "base", "checkpoints/step-00000001/merged")]
    places.append(f"{jobs[0]}/checkpoints/step-00000002/merged")
    logs = [log_name(place) for place in places]
    logs += [log_name("/home/models/tiny-llama", place) for place in places] + [log_name("/home/models/tiny-llama")]
    logs += [log_name("/home/other/tiny-llama"), log_name("/home/models/tiny-llama", "/x/artifact")]
    assert len(set(logs)) == len(logs)
    assert logs[0].startswith(f"ftjob-{'A' * 24}-artifact-") and logs[-2].startswith("tiny-llama-")
    assert log_name(places[0]) == logs[0]
