"""The server, driven by a client that nobody here wrote: the `openai` package."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from nanopd_lab import LLM, Cluster, ClusterConfig, SamplingParams
from nanopd_lab.cli import main
from nanopd_lab.cluster.actions import Limits
from nanopd_lab.serve.app import create_app

MODEL = "smollm2"
HELLO: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
KEY = "secret"
CONTINUOUS: Any = {"include_usage": True, "continuous_usage_stats": True}


class Served:
    """A cluster of two workers behind a server on a free port."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(
            uvicorn.Config(create_app(cluster, api_key=KEY, per_request_metrics=True), log_level="warning")
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def idle(self) -> bool:
        """True if no worker has anything to do."""
        return not any(view.jobs for view in self.cluster.workers())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    config = ClusterConfig(
        MODEL, workers=2, policy="1p1d", limits=Limits(max_queue=20), engine={"max_num_seqs": 8}
    )
    with Cluster(config) as cluster:
        served = Served(cluster)
        yield served
        served.stop()
        cluster.check_integrity()


def test_a_completion_is_that_of_the_engine(served: Served) -> None:
    prompt = "The capital of France is"
    (own,) = LLM(MODEL).generate([prompt], SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    found = served.client.completions.create(model=MODEL, prompt=prompt, max_tokens=10, temperature=0)
    assert found.choices[0].text == own.outputs[0].text
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(own.prompt_token_ids), 10)
    ids = served.client.completions.create(
        model=MODEL, prompt=list(own.prompt_token_ids), max_tokens=10, temperature=0
    )
    assert ids.choices[0].text == own.outputs[0].text


def test_a_stream_says_what_the_whole_answer_says(served: Served) -> None:
    create = served.client.chat.completions.create
    whole = create(model=MODEL, messages=HELLO, max_tokens=12, temperature=0.8, seed=3, n=2)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in create(
        model=MODEL, messages=HELLO, max_tokens=12, temperature=0.8, seed=3, n=2,
        stream=True, stream_options={"include_usage": True},
    ):  # fmt: skip
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_can_say_its_usage_as_it_goes(served: Served) -> None:
    """vLLM's extension, which load generators ask for."""
    stream = served.client.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=8, temperature=0, stream=True, stream_options=CONTINUOUS,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts)
    assert 1 <= counts[0] < counts[-1] == 8


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_says_how_long_it_took(served: Served, stream: bool) -> None:
    asked = {"model": MODEL, "prompt": "The sky is", "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    create, begun = served.client.completions.create, time.monotonic()
    if stream:
        *_, last = create(**asked, stream=True, stream_options=CONTINUOUS)
    else:
        last = create(**asked)
    waited_ms = 1e3 * (time.monotonic() - begun)
    found = last.model_extra["metrics"]
    parts = [found[name] for name in ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms")]
    assert min(parts) > 0
    assert sum(parts) < waited_ms
    assert found["mean_itl_ms"] == pytest.approx(found["generation_time_ms"] / 4)
    assert found["tokens_per_second"] == pytest.approx(5e3 / sum(parts[1:]))


def test_an_answer_says_what_was_cached(served: Served) -> None:
    """Also if the workers' accounts come after the last token."""
    asked = {"model": MODEL, "prompt": list(range(1000, 1040)), "max_tokens": 2}
    found = [served.client.completions.create(**asked).usage for _ in range(8)]
    assert [usage.prompt_tokens_details.cached_tokens for usage in found] == [0] + [32] * 7


def test_times_of_several_samples_are_nobodys(served: Served) -> None:
    found = served.client.completions.create(model=MODEL, prompt="x", max_tokens=2, n=2)
    assert found.model_extra["metrics"] is None


def test_several_prompts_number_their_choices_through(served: Served) -> None:
    prompts = ["One, two, three,", "The sky is"]
    found = served.client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, temperature=0, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text != found.choices[2].text
    streamed = ["", "", "", ""]
    for chunk in served.client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=4, temperature=0, n=2, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in found.choices]


def test_stop_strings_end_an_answer(served: Served) -> None:
    create = served.client.completions.create
    free = create(model=MODEL, prompt="1, 2, 3,", max_tokens=16, temperature=0).choices[0].text
    assert " 6" in free
    stopped = create(model=MODEL, prompt="1, 2, 3,", max_tokens=16, temperature=0, stop=[" 6"]).choices[0]
    assert stopped.text == free[: free.index(" 6")]
    assert stopped.finish_reason == "stop"


def test_logprobs_come_for_every_token(served: Served) -> None:
    chat = served.client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == 5
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0  # greedy: the likeliest
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
    assert "".join(entry.token for entry in entries) == chat.choices[0].message.content
    older = served.client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0, logprobs=2
    ).choices[0]
    assert "".join(older.logprobs.tokens) == older.text
    assert [len(top) for top in older.logprobs.top_logprobs] == [2] * 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_tokens": 10**6}, "the largest worker takes"),
        ({"logprobs": 999}, "logprobs is 999"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5, which is not served here"),
        ({"echo": True}, "echo is True, which is not served here"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [10**7]}, "token 0 is 10000000"),
        ({"stop": ""}, "stop holds an empty string"),
        ({"stream_options": {"include_usage": True}}, "stream is false"),
        ({"seed": "seven"}, "seed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_named_in_a_400(
    served: Served, wrong: dict[str, Any], message: str, stream: bool
) -> None:
    if stream and "stream_options" in wrong:
        pytest.skip("that is right with a stream")
    asked = {"model": MODEL, "prompt": "x", "stream": stream, **wrong}
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(**asked)
    assert message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_an_unknown_model_and_a_wrong_key_are_refused(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'gpt-9' is not served here; ask for 'smollm2'"):
        served.client.completions.create(model="gpt-9", prompt="x")
    stranger = served.client.with_options(api_key="guess")
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        stranger.models.list()
    (model,) = served.client.models.list().data
    assert model.id == MODEL


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_request(served: Served, stream: bool) -> None:
    asked = {
        "model": MODEL,
        "prompt": "Once upon a time",
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": stream,
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    if stream:
        with httpx.stream(
            "POST", f"{served.url}/v1/completions", json=asked, headers=headers, timeout=60
        ) as answer:
            first = json.loads(next(answer.iter_lines()).removeprefix("data: "))
            assert first["choices"][0]["finish_reason"] is None, first
            assert not served.idle(), (first, served.cluster.workers())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=asked, headers=headers, timeout=2)
    _wait(served.idle, 20)  # 1,500 tokens would take longer


def _wait(true: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_metrics_count_what_was_served(served: Served) -> None:
    def value(name: str) -> float:
        text = httpx.get(f"{served.url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    _wait(served.idle)
    before = {name: value(name) for name in ("nanopd_generation_tokens_total", "nanopd_requests_total")}
    served.client.completions.create(model=MODEL, prompt="x y z", max_tokens=6, temperature=0, n=2)
    _wait(lambda: value("nanopd_requests_total") == before["nanopd_requests_total"] + 2)
    assert value("nanopd_generation_tokens_total") == before["nanopd_generation_tokens_total"] + 12
    assert value('nanopd_requests_total{reason="length",route="disaggregated"}') >= 2
    assert value("nanopd_transferred_tokens_total") > 0
    assert value("nanopd_time_to_first_token_seconds_count") > 0
    assert value("nanopd_worker_kv_usage") >= 0
    assert value("nanopd_requests_running") == 0


def test_health_names_the_workers(served: Served) -> None:
    found = httpx.get(f"{served.url}/health")
    assert found.status_code == 200
    assert found.json() == {"status": "ok", "workers": {"w0": "prefill", "w1": "decode"}}


def test_overload_is_a_503_that_says_when_to_come_back(served: Served) -> None:
    asked = {"model": MODEL, "prompt": ["a"] * 60, "max_tokens": 400, "ignore_eos": True}
    answer = httpx.post(
        f"{served.url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {KEY}"}, timeout=120
    )
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["type"] == "overloaded_error"
    _wait(served.idle)  # the ones that had been taken are cancelled


def test_bad_flags(capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", "--port", "70000"]) == 2
    assert "port is 70000; it must lie between 0 and 65535" in capsys.readouterr().err
    assert main(["serve", "--max-queue", "0"]) == 2
    assert "max_queue is 0" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--model", "no-such-model", "--port", str(port)]) == 2
    found = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in found
    assert "choose another --host or --port" in found


def test_an_answer_is_json_that_ends_with_done(served: Served) -> None:
    asked = {"prompt": "Hi", "max_tokens": 3, "temperature": 0, "stream": True}
    answer = httpx.post(
        f"{served.url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        assert json.loads(event)["object"] == "text_completion"
