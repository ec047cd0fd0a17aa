"""What the service answers: as `Recommender.recommend`, alone and in batches; limits, stop, timeouts, logs, token."""

import asyncio
import json
import threading
import time

import httpx2
import pytest
import torch

from onerec_hf.serving import Limits
from onerec_hf.serving.errors import Refused
from onerec_hf.serving.schemas import RecommendBody

from ..numeric import assert_close
from ..test_recommender import recommender_of
from .served import application, ask, client, never, recommender

HISTORIES = [[1000, 1001, 1002], [1063], []]


def same(results, expected):
    """The items and metadata of `Recommender.recommend`; scores of two code paths."""
    assert [[one["item_id"] for one in row] for row in results] == [[one.item_id for one in row] for row in expected]
    for row, other in zip(results, expected):
        assert [one["metadata"] for one in row] == [one.metadata for one in other]
        assert_close(torch.tensor([one["score"] for one in row]), torch.tensor([one.score for one in other]))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"k": 40},
        {"exclude_seen": True},
        {"rerank": False},
        {"allow": [1003, 1004, 1005], "k": 2},
        {"allow": [[1003], None, [1004, 1005]], "deny": [None, [1002, 1060], [1004]]},
    ],
)
def test_it_answers_as_the_recommender(arguments):
    """The re-ranker of the repository works here, too: with it the order is another."""
    own = recommender()
    with client(own) as http:
        answer = http.post("/recommend", json={"histories": HISTORIES, **arguments}).json()
    expected = own.recommend(HISTORIES, **{"k": 10, **arguments})
    same(answer["results"], expected)
    assert answer["version"] == "v1" and answer["fingerprint"] == own.model.catalogue.fingerprint()
    if not arguments:
        alone = own.recommend(HISTORIES, rerank=False)
        assert [[one.item_id for one in row] for row in alone] != [[one.item_id for one in row] for row in expected]


def test_sessions():
    own = recommender("onerec", with_reranker=False)
    with client(own) as http:
        answer = http.post("/recommend", json={"histories": HISTORIES, "k": 3, "session": True}).json()
    expected = own.recommend(HISTORIES, 3, session=True)
    assert [[one["item_ids"] for one in row] for row in answer["results"]] == [
        [one.item_ids for one in row] for row in expected
    ]
    assert answer["results"][0][0]["metadata"][0]["title"].startswith("item 1")


def test_events_and_features_that_only_some_requests_have():
    from onerec_hf.data import EventFeature

    features = {"event_features": {"is_like": EventFeature("category", 3)}}
    own = recommender_of(user_features={"age": [0, 1, 2, 3]}, **features)
    bodies = [
        {"histories": [[1000, 1001]], "events": {"is_like": [[1, 2]]}, "users": {"age": [3]}},
        {"histories": [[1000, 1001]]},
        {"histories": [[1000, 1001], [1002]], "users": {"age": [1, None]}},
    ]
    service, searched = application(own, max_wait_ms=200.0).state.service, []
    plain = service.batcher.search

    def watched(questions):
        searched.append(len(questions))
        return plain(questions)

    service.batcher.search = watched
    found = ask(service, *bodies)
    assert searched == [3]  # and not once more, each alone, because they failed together
    for body, (_, answer) in zip(bodies, found):
        for got, wanted in zip(answer.lists, own.recommend(**body)):
            assert [one.item_id for one in got] == [one.item_id for one in wanted]
            assert_close(torch.tensor([one.score for one in got]), torch.tensor([one.score for one in wanted]))
    assert found[0][1].lists[0][0].score != found[1][1].lists[0][0].score  # the columns are read


def test_different_requests_are_searched_together():
    """Other users, lengths, k and filters in one search; another width or kind of list in a search of its own."""
    own = recommender()
    together = [
        {"histories": [[1000]], "k": 3},
        {"histories": [[1001] * 9, []], "k": 20},
        {"histories": [[1002]], "deny": [1003, 1004]},
        {"histories": [[1005]], "allow": [[1006, 1007]]},
    ]
    apart = [{"histories": [[1000]], "k": 21}, {"histories": [[1000]], "exclude_seen": True}]
    apart += [{"histories": [[1000]], "rerank": False}]
    found = ask(application(own, max_wait_ms=300.0).state.service, *together, *apart)
    assert [answer.batch_rows for _, answer in found] == [5, 5, 5, 5, 1, 1, 1]
    for body, (_, answer) in zip(together + apart, found):
        expected = own.recommend(**body)
        assert [[one.item_id for one in row] for row in answer.lists] == [
            [one.item_id for one in row] for row in expected
        ]


def test_batches_have_at_most_so_many_rows_and_similar_lengths():
    bodies = [{"histories": [[1000] * length]} for length in (2, 40, 3, 45, 2, 42)]
    service = application(max_rows=3, max_wait_ms=300.0).state.service
    searched = []
    plain = service.batcher.search

    def watched(questions):
        searched.append([len(one.histories[0]) for one in questions])
        return plain(questions)

    service.batcher.search = watched
    ask(service, *bodies)
    assert searched == [[2, 3, 2], [40, 45, 42]]


def test_the_oldest_request_waits_no_longer_than_it_was_told():
    """Not a time but an order: with a wait of an hour one request is answered because the batch is full."""
    service = application(max_rows=2, max_wait_ms=3_600_000.0).state.service
    found = ask(service, {"histories": [[1000]]}, {"histories": [[1001]]})
    assert [answer.batch_rows for _, answer in found] == [2, 2]


class Stuck:
    """A search that waits until it is let go."""

    def __init__(self, service):
        self.plain, self.go, self.started, self.asked = (
            service.batcher.search,
            threading.Event(),
            threading.Event(),
            [],
        )
        service.batcher.search = self

    def __call__(self, questions):
        self.asked += questions
        self.started.set()
        assert self.go.wait(30)
        return self.plain(questions)


def test_a_full_queue_says_so_and_the_others_are_answered():
    service = application(max_queue=3, max_histories=2, max_rows=1, max_wait_ms=0).state.service
    stuck = Stuck(service)

    async def run():
        body = RecommendBody(histories=[[1000]])
        tasks = [asyncio.create_task(service.recommend(body, never))]
        await asyncio.to_thread(stuck.started.wait)
        tasks += [asyncio.create_task(service.recommend(body, never)) for _ in range(5)]
        await asyncio.sleep(0.05)
        stuck.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    refused = [one for one in found if isinstance(one, Refused)]
    assert [(one.status_code, one.code, one.headers["Retry-After"]) for one in refused] == [
        (429, "queue_full", "1")
    ] * 2
    assert len(found) - len(refused) == 4 and service.batcher.rows == 0


def test_what_takes_too_long_is_given_up_and_never_searched():
    service = application(timeout_s=0.1, max_rows=1).state.service
    stuck = Stuck(service)

    async def run():
        bodies = [RecommendBody(histories=[[1000 + i]]) for i in range(3)]
        found = await asyncio.gather(*(service.recommend(one, never) for one in bodies), return_exceptions=True)
        assert service.not_ready() == "a search runs for more than 0.1 seconds"
        stuck.go.set()
        service.limits.timeout_s = 30.0
        later = await service.recommend(RecommendBody(histories=[[1005]]), never)
        return found, later

    found, later = asyncio.run(run())
    assert [(one.status_code, one.code) for one in found] == [(503, "timeout")] * 3
    assert [one.histories for one in stuck.asked] == [[[1000]], [[1005]]]  # those that waited left the queue
    assert later[1].lists[0] and service.batcher.rows == 0


def test_a_client_that_goes_leaves_the_queue():
    service = application(max_rows=1).state.service
    stuck = Stuck(service)

    async def run():
        gone = asyncio.Event()
        first = asyncio.create_task(service.recommend(RecommendBody(histories=[[1000]]), never))
        await asyncio.to_thread(stuck.started.wait)
        second = asyncio.create_task(service.recommend(RecommendBody(histories=[[1001]]), gone.wait))
        await asyncio.sleep(0)
        gone.set()
        with pytest.raises(Refused, match="closed the connection"):
            await second
        assert service.batcher.rows == 0
        stuck.go.set()
        await first

    asyncio.run(run())
    assert [one.histories for one in stuck.asked] == [[[1000]]]


def test_a_question_that_fails_takes_no_other_with_it():
    service = application(max_wait_ms=200.0).state.service
    plain = service.batcher.search

    def broken(questions):
        if any(one.histories == [[1001]] for one in questions):
            raise RuntimeError("of the second alone")
        return plain(questions)

    service.batcher.search = broken
    found = ask(service, *({"histories": [[1000 + i]]} for i in range(3)))
    assert found[1].status_code == 500 and "second" not in found[1].detail
    assert found[0][1].lists[0] and found[2][1].lists[0]


def test_it_drains():
    """What waits is answered, what comes is refused."""
    service = application(max_rows=1).state.service
    stuck = Stuck(service)

    async def run():
        bodies = [RecommendBody(histories=[[1000 + i]]) for i in range(4)]
        tasks = [asyncio.create_task(service.recommend(one, never)) for one in bodies]
        await asyncio.to_thread(stuck.started.wait)
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="stopping") as refused:
            await service.recommend(bodies[0], never)
        assert refused.value.status_code == 503 and service.not_ready() == "the service is stopping"
        stuck.go.set()
        await closing
        return await asyncio.gather(*tasks)

    assert [bool(answer.lists[0]) for _, answer in asyncio.run(run())] == [True] * 4


def test_torch_runs_in_one_thread_and_the_loop_stays_free():
    """Health is answered while a search runs, and all searches run in the same other thread."""
    app = application()
    stuck, threads = Stuck(app.state.service), set()
    plain = stuck.plain

    def noted(questions):
        threads.add(threading.current_thread().name)
        return plain(questions)

    stuck.plain = noted

    async def run():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x") as http:
            tasks = [asyncio.create_task(http.post("/recommend", json={"histories": [[1000]]}))]
            await asyncio.to_thread(stuck.started.wait)
            assert (await http.get("/health")).json() == {"status": "ok"}
            assert (await http.get("/ready")).status_code == 200
            stuck.go.set()
            tasks += [
                asyncio.create_task(http.post("/recommend", json={"histories": [[1001]], "k": k})) for k in (1, 30)
            ]
            return [(await task).status_code for task in tasks]

    assert asyncio.run(run()) == [200] * 3
    assert len(threads) == 1 and threading.current_thread().name not in threads


def test_the_examples_of_the_openapi_page_run(tmp_path):
    with client(bundles=tmp_path) as http:
        schema = http.get("/openapi.json").json()
        paths = {name.split("Body")[0].lower(): own["examples"] for name, own in _bodies(schema).items()}
        assert set(paths) == {"recommend", "catalogue", "model"}
        for path, examples in paths.items():
            for example in examples:
                answer = http.post(f"/{path}", json=example)
                assert answer.status_code == 200, answer.text
        assert http.get("/docs").status_code == 200


def _bodies(schema):
    return {name: own for name, own in schema["components"]["schemas"].items() if name.endswith("Body")}


def test_info_and_metrics():
    with client() as http:
        http.post("/recommend", json={"histories": [[1000], []]})
        http.post("/recommend", json={"histories": [["no such id"]]})
        info, text = http.get("/info").json(), http.get("/metrics").text
    assert info["model"]["class"] == "OneRecV2ForCausalLM" and info["model"]["reranker"] == ["codes", "counter"]
    assert info["catalogue"]["num_items"] == 65 and info["limits"]["max_k"] == Limits().max_k
    assert [one["name"] for one in info["versions"]] == [info["version"]] == ["v1"]
    for line in (
        'onerec_requests_total{path="/recommend",status="200"} 1.0',
        'onerec_requests_total{path="/recommend",status="422"} 1.0',
        'onerec_refused_total{code="unknown_items"} 1.0',
        'onerec_batch_rows_bucket{le="2.0"} 1.0',
        "onerec_catalogue_items 65.0",
    ):
        assert line in text


def test_logs_are_json_without_histories(caplog):
    with caplog.at_level("INFO", "onerec_hf.serving"), client() as http:
        http.post("/recommend", json={"histories": [[1000, 1001]], "k": 3, "deny": [1017]})
        http.post("/recommend", json={"histories": [["secret-of-a-user"]]})
        answer = http.post("/recommend", json={"histories": "secret-of-a-user"})
        assert "secret" not in answer.text  # nor in answers that a proxy may log
        service = http.app.state.service

        def broken(questions):
            raise RuntimeError(f"secret-of-a-user {questions[0].histories}")

        service.batcher.search = broken
        assert http.post("/recommend", json={"histories": [[1031]]}).status_code == 500
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "onerec_hf.serving"]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 422, 422, 500]
    assert requests[0]["rows"] == 1 and requests[0]["version"] == "v1" and requests[0]["search_ms"] > 0
    assert requests[1]["code"] == "unknown_items"
    for secret in ("secret", "1000", "1001", "1017", "1031"):
        assert not any(
            secret in str({k: v for k, v in line.items() if k not in ("time", "request")}) for line in lines
        )


def test_a_token():
    with client(token="s3cret") as http:
        for path in ("/health", "/ready", "/openapi.json"):
            assert http.get(path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            answer = http.post("/recommend", json={"histories": [[]]}, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert http.get("/info", headers=headers).status_code == 401
        good = {"Authorization": "Bearer s3cret"}
        assert http.post("/recommend", json={"histories": [[]]}, headers=good).status_code == 200
        assert http.get("/metrics", headers=good).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"), [("max_rows", 0), ("timeout_s", 0.0), ("max_wait_ms", -1.0), ("body_timeout_s", float("nan"))]
)
def test_limits_that_cannot_work_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: at least"):
        Limits(**{name: value})


def test_a_request_must_fit_into_the_queue():
    with pytest.raises(ValueError, match="max_histories=32 and max_queue=4: one request must find room"):
        Limits(max_queue=4)


def test_a_body_that_comes_slowly_is_given_up():
    app = application(body_timeout_s=0.05)
    sent = []

    async def receive():
        if len(sent) == 0 and not receive.begun:
            receive.begun = True
            return {"type": "http.request", "body": b'{"histories"', "more_body": True}
        await asyncio.Event().wait()

    receive.begun = False

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/recommend", "raw_path": b"/recommend", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}
    scope |= {"server": ("x", 1), "client": ("x", 1), "root_path": "", "asgi": {"version": "3.0"}}
    start = time.monotonic()
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "slow_body"
    assert time.monotonic() - start < 20


def test_the_first_version_can_be_warmed_or_refused():
    own = recommender()
    with torch.no_grad():
        next(own.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="scores are NaN"):
        application(own)
