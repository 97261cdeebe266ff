"""The judge, against a real HTTP server on this machine that answers well, wrongly, late, busily or not at all."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_notebooks import execute

import helpers

TASKS = [
    {"task_id": i, "input": f"{i} + {i} は?", "output": str(2 * i), "eval_aspect": "- 答えが違えば1点"}
    for i in range(5)
]
ANSWERS = [f"答えは{2 * i}です。" for i in range(5)]
GOOD = '{"reason": "正しい", "grade": 4}'


class Server(ThreadingHTTPServer):
    """Answers the n-th request with the n-th of `plan`, its last entry for ever: text, a status, or seconds to wait."""

    daemon_threads = True

    def __init__(self, *plan):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.requests, self.times = list(plan), [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "headers": dict(self.headers), **body})
        self.server.times.append(time.monotonic())
        plan = self.server.plan
        step = plan.pop(0) if len(plan) > 1 else plan[0]
        if isinstance(step, float):
            time.sleep(step)
            step = GOOD
        status, text = (step, "") if isinstance(step, int) else (200, step)
        message = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}
        content = text if text.startswith("<") else json.dumps(message)
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client has given up waiting
            self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*plan):
        servers.append(Server(*plan))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge(server, cache, tasks=TASKS, answers=ANSWERS, **values):
    values = {"model": "judge-1", "key": "secret-key", "timeout": 5.0} | values
    return helpers.judge_answers(tasks, answers, base_url=server.url, cache=cache, **values)


def test_grades_are_asked_for_by_the_rubric_and_kept(serve, tmp_path):
    server = serve(GOOD, '```json\n{"grade": 2, "reason": ""}\n```', GOOD)
    result = judge(server, tmp_path)
    assert result["grades"] == {0: 4, 1: 2, 2: 4, 3: 4, 4: 4}
    assert (result["failures"], result["requests"], result["prompt_tokens"]) == ([], 5, 50)
    request = server.requests[3]
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "judge-1", 0)
    assert request["headers"]["Authorization"] == "Bearer secret-key"
    question = request["messages"][1]["content"]
    for part in ("3 + 3 は?", "答えは6です。", "【正解例】\n6", "- 答えが違えば1点"):
        assert part in question


def test_what_is_known_is_not_asked_again_and_what_changed_is(serve, tmp_path):
    server = serve(GOOD)
    judge(server, tmp_path)
    again = judge(server, tmp_path)
    assert (len(server.requests), again["from_cache"], again["requests"]) == (5, 5, 0)
    assert again["grades"] == dict.fromkeys(range(5), 4)
    judge(server, tmp_path, answers=["別の答え", *ANSWERS[1:]])
    assert len(server.requests) == 6
    judge(server, tmp_path, model="judge-2")
    assert len(server.requests) == 11


def test_a_new_rubric_is_asked_again(serve, tmp_path, monkeypatch):
    server = serve(GOOD)
    judge(server, tmp_path)
    monkeypatch.setattr(helpers, "RUBRIC_VERSION", "test")
    judge(server, tmp_path)
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    "wrong",
    ["良い答えです。4点。", '{"grade": 6}', '{"grade": "4"}', '{"grade": true}', '{"score": 4}', "{grade: 4}", ""],
)
def test_an_unreadable_grade_is_asked_for_once_more(serve, tmp_path, wrong):
    server = serve(wrong, GOOD)
    assert judge(server, tmp_path, TASKS[:1], ANSWERS[:1])["grades"] == {0: 4}
    first, second = (request["messages"] for request in server.requests)
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": wrong}


@pytest.mark.parametrize("wrong", ["4点", "<html>maintenance</html>"])
def test_a_judge_that_never_answers_in_json_is_a_failure_of_each_task(serve, tmp_path, wrong):
    server = serve(wrong)
    result = judge(server, tmp_path)
    assert result["grades"] == {}
    assert [failure["task_id"] for failure in result["failures"]] == [0, 1, 2, 3, 4]
    assert len(server.requests) == (10 if wrong == "4点" else 5)
    assert not list(tmp_path.iterdir())


def test_a_busy_judge_is_asked_again_when_it_says(serve, tmp_path):
    server = serve(429, GOOD)
    assert judge(server, tmp_path, TASKS[:1], ANSWERS[:1])["grades"] == {0: 4}
    assert 1 <= server.times[1] - server.times[0] < 3


def test_a_server_error_is_asked_again(serve, tmp_path):
    server = serve(500, GOOD)
    assert judge(server, tmp_path, TASKS[:1], ANSWERS[:1])["grades"] == {0: 4}
    assert len(server.requests) == 2


def test_after_time_outs_the_grades_so_far_stay_and_only_the_rest_is_asked_later(serve, tmp_path):
    server = serve(GOOD, GOOD, 2.0)
    result = judge(server, tmp_path, timeout=0.2)
    assert result["grades"] == {0: 4, 1: 4}
    assert {failure["reason"] for failure in result["failures"]} == {"ReadTimeout"}
    assert len(server.requests) == 5
    server.plan[:] = [GOOD]
    later = judge(server, tmp_path)
    assert (later["grades"], later["requests"]) == (dict.fromkeys(range(5), 4), 3)


def test_nobody_is_asked_after_three_refusals(serve, tmp_path):
    server = serve(401)
    result = judge(server, tmp_path)
    assert len(server.requests) == 3
    assert [failure["reason"] for failure in result["failures"]] == [
        *["HTTP 401"] * 3,
        *["not asked: no answer 3 times in a row"] * 2,
    ]


def test_a_server_that_is_not_there_is_a_failure_and_no_error(serve, tmp_path):
    server = serve(GOOD)
    server.shutdown()
    server.server_close()
    result = judge(server, tmp_path, TASKS[:1], ANSWERS[:1])
    assert result["failures"] == [{"task_id": 0, "reason": "ConnectionError"}]


def test_the_key_is_written_nowhere(serve, tmp_path):
    result = judge(serve(GOOD, 401), tmp_path)
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json"))
    assert written
    assert "secret-key" not in written + json.dumps(result)


def test_tasks_without_reference_are_not_judged(serve, tmp_path):
    server = serve(GOOD)
    tasks = [{**TASKS[0], "output": None}, TASKS[1]]
    assert judge(server, tmp_path, tasks, ANSWERS[:2])["grades"] == {1: 4}


@pytest.mark.parametrize(("references", "graded"), [(["420", None, ""], {"0": 4}), ([None, None, None], {})])
def test_notebook_scores_the_tasks_with_a_reference(serve, smoke, tmp_path, monkeypatch, references, graded):
    """The judge at work in notebook 04; a missing reference is no error, and the key is in no file."""
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    tasks = [{"task_id": i, "input": f"課題{i}", "output": text} for i, text in enumerate(references)]
    helpers.write_jsonl(tmp_path / "tasks.jsonl", tasks)
    values = {"tasks": str(tmp_path / "tasks.jsonl"), "model": str(smoke / "quantized"), "adapter": "none", "k": 1}
    server = serve(GOOD)
    execute("04_rag_inference", tmp_path / "run", **values, judge_base_url=server.url, judge_model="judge-1")
    scores = json.loads((tmp_path / "run/scores.json").read_text(encoding="utf-8"))
    assert (scores["tasks_with_reference"], scores["judge"]["grades"]) == (len(graded), graded)
    assert [scored["chrf"] is not None for scored in scores["per_task"]] == [bool(text) for text in references]
    assert scores["mean"]["characters"]["tasks"] == 3
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"secret-key" in path.read_bytes()]
