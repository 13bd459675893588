"""Two clients of the real ComfyUI that queue at the same time: each gets what it gets alone."""

import threading

import pytest
from listening import Listener, Run, listening
from test_nodes import FINE, frames, predict_lora, sample
from test_rerun import OTHER, large_file, with_file  # noqa: F401 (a fixture)


@pytest.fixture
def clients(server):
    with listening(server.url) as first, listening(server.url) as second:
        yield first, second


def with_lora(text: str) -> dict:
    return predict_lora(text=text) | sample(["4", 1], "with", 10)


def without_lora() -> dict:
    """The same nodes under the same numbers, the LoRA predicted and not used."""
    prompt = with_lora(FINE)
    prompt["13"]["inputs"]["model"] = ["1", 0]
    return prompt


def alone(server, prompt: dict) -> list[bytes]:
    server.forget()
    return frames(server, server.succeed(prompt), "15")


def at_once(clients: tuple[Listener, Listener], prompts: tuple[dict, dict]) -> list[Run]:
    """What both hear of workflows that they queue at the same moment."""
    found: dict[int, Run] = {}
    start = threading.Barrier(2)

    def run(place: int) -> None:
        start.wait()
        found[place] = clients[place].run(prompts[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(2)]


@pytest.mark.parametrize("other", [with_lora(OTHER), without_lora(), with_lora(FINE)])
def test_both_get_what_each_gets_alone(server, clients, other):
    prompts = with_lora(FINE), other
    wanted = [alone(server, prompt) for prompt in prompts]
    assert (wanted[0] == wanted[1]) == (prompts[0] == prompts[1])
    for _ in range(2):
        server.forget()
        runs = at_once(clients, prompts)
        assert [run.ended for run in runs] == ["success", "success"]
        assert [frames(server, run.outputs, "15") for run in runs] == wanted


def test_what_is_said_below_a_node_is_said_to_its_client_alone(server, clients):
    server.forget()
    first, second = clients
    first.run(with_lora(FINE))
    second.run(without_lora())
    assert any("layers matched" in text for text in first.texts["4"])
    assert second.texts == {}  # what it queued came from the cache


def test_the_one_that_waits_runs_when_the_first_is_interrupted(server, clients, large_file):  # noqa: F811
    waiting = without_lora()
    wanted = alone(server, waiting)
    first, second = clients
    running = first.queue(with_file(large_file.name))
    for kind, data in first.messages():
        assert kind not in ("execution_error", "execution_success"), data
        if kind == "progress" and data["node"] == "4" and data["value"] > 0:
            break
    queued = second.queue(waiting)
    second.post("/interrupt", {"prompt_id": queued})  # it waits: nothing to interrupt
    for kind, data in first.messages():
        assert kind not in ("execution_error", "execution_success", "execution_interrupted"), data
        if kind == "progress" and data["node"] == "4":
            break
    first.post("/interrupt", {"prompt_id": running})
    assert first.until_ended(running).ended == "interrupted"
    run = second.until_ended(queued)
    assert run.ended == "success" and frames(server, run.outputs, "15") == wanted
