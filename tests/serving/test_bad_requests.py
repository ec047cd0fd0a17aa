"""What a client can get wrong: each is a 4xx with a reason, quickly, and the next request is answered."""

import json

import pytest

from .served import client

JSON = {"content-type": "application/json"}
OK = {"histories": [[1000, 1001]]}
EVERYTHING = list(range(1000, 1065))
LIMITS = {"max_body_bytes": 20_000, "max_history_items": 200, "max_filter_items": 100, "max_k": 50, "max_histories": 8}


@pytest.fixture(scope="module")
def http():
    with client(**LIMITS) as own:
        yield own


# name -> what replaces or joins the body, the code of the answer, what its message says
BODIES = {
    "no body fields": ({"histories": None}, "invalid_request", "histories"),
    "no histories": ({"histories": []}, "invalid_request", "at least 1"),
    "histories are text": ({"histories": "1000"}, "invalid_request", "valid list"),
    "histories are a number": ({"histories": 1000}, "invalid_request", "valid list"),
    "histories are an object": ({"histories": {"a": [1]}}, "invalid_request", "valid list"),
    "one history that is not in a list": ({"histories": [1000, 1001]}, "invalid_request", "histories.0"),
    "a history of text": ({"histories": ["1000"]}, "invalid_request", "histories.0"),
    "a history of lists": ({"histories": [[[1000]]]}, "invalid_request", "histories.0.0"),
    "a history of null": ({"histories": [None]}, "invalid_request", "histories.0"),
    "null in a history": ({"histories": [[1000, None]]}, "invalid_request", "histories.0.1"),
    "true in a history": ({"histories": [[True]]}, "invalid_request", "histories.0.0"),
    "a fraction in a history": ({"histories": [[1000.5]]}, "invalid_request", "histories.0.0"),
    "a whole float in a history": ({"histories": [[1000.0]]}, "invalid_request", "histories.0.0"),
    "an object in a history": ({"histories": [[{"id": 1000}]]}, "invalid_request", "histories.0.0"),
    "an unknown id": ({"histories": [[999]]}, "unknown_items", "the first is 999"),
    "an unknown id among known ones": ({"histories": [[1000, 5, 1001]]}, "unknown_items", "1 of 3"),
    "an id as text": ({"histories": [["1000"]]}, "unknown_items", "'1000', and the catalogue's ids are integers"),
    "text and numbers": ({"histories": [[1000, "1001"]]}, "unknown_items", "'1001'"),
    "a negative id": ({"histories": [[-1]]}, "unknown_items", "-1"),
    "an id beyond 64 bits": ({"histories": [[2**63]]}, "unknown_items", str(2**63)),
    "an id of 200 digits": ({"histories": [[10**200]]}, "unknown_items", "1 of 1"),
    "an empty text as id": ({"histories": [[""]]}, "unknown_items", "''"),
    "an emoji as id": ({"histories": [["🎬"]]}, "unknown_items", "🎬"),
    "right-to-left text as id": ({"histories": [["\u202eabc"]]}, "unknown_items", "item ids are not in the catalogue"),
    "a null character in an id": ({"histories": [["a\x00b"]]}, "unknown_items", "item ids are not in the catalogue"),
    "a line separator in an id": ({"histories": [["a\u2028b"]]}, "unknown_items", "item ids are not in the catalogue"),
    "combining marks as id": ({"histories": [["é" * 50]]}, "unknown_items", "item ids are not in the catalogue"),
    "a very long id": ({"histories": [["x" * 9000]]}, "unknown_items", "1 of 1"),
    "a surrogate as id": ({"histories": [["\ud800"]]}, "unknown_items", "item ids are not in the catalogue"),
    "one item 10,000 times": ({"histories": [[1] * 5000]}, "limit", "items of a history: 5000, at most 200"),
    "one item 201 times": ({"histories": [[1000] * 201]}, "limit", "at most 200"),
    "too many histories": ({"histories": [[1000]] * 9}, "limit", "histories: 9, at most 8"),
    "k is 0": ({"k": 0}, "invalid_request", "k: "),
    "k is negative": ({"k": -5}, "invalid_request", "k: "),
    "k is a million": ({"k": 1_000_000}, "limit", "k: 1000000, at most 50"),
    "k is beyond 64 bits": ({"k": 10**30}, "limit", "at most 50"),
    "k is a fraction": ({"k": 1.5}, "invalid_request", "k: "),
    "k is a whole float": ({"k": 10.0}, "invalid_request", "k: "),
    "k is text": ({"k": "10"}, "invalid_request", "k: "),
    "k is true": ({"k": True}, "invalid_request", "k: "),
    "k is null": ({"k": None}, "invalid_request", "k: "),
    "k is a list": ({"k": [10]}, "invalid_request", "k: "),
    "exclude_seen is text": ({"exclude_seen": "yes"}, "invalid_request", "exclude_seen"),
    "exclude_seen is 1": ({"exclude_seen": 1}, "invalid_request", "exclude_seen"),
    "exclude_seen is null": ({"exclude_seen": None}, "invalid_request", "exclude_seen"),
    "session of a model without": ({"session": True}, "no_sessions", "single items"),
    "session is text": ({"session": "true"}, "invalid_request", "session"),
    "rerank is text": ({"rerank": "no"}, "invalid_request", "rerank"),
    "unknown_items is something else": ({"unknown_items": "drop"}, "invalid_request", "'error' or 'ignore'"),
    "unknown_items is null": ({"unknown_items": None}, "invalid_request", "unknown_items"),
    "allow is a number": ({"allow": 1000}, "invalid_request", "allow"),
    "allow is text": ({"allow": "1000"}, "invalid_request", "allow"),
    "allow is an object": ({"allow": {"a": 1}}, "invalid_request", "allow"),
    "allow of nothing": ({"allow": []}, "no_items_left", "widen"),
    "allow of nothing for the user": ({"allow": [[]]}, "no_items_left", "widen"),
    "allow of unknown ids": ({"allow": [1]}, "unknown_items", "the first is 1"),
    "allow of unknown ids for the user": ({"allow": [[1]]}, "unknown_items", "the first is 1"),
    "allow of null": ({"allow": [1000, None]}, "invalid_request", "allow"),
    "allow for two users": ({"allow": [[1000], [1001]]}, "invalid_request", "2 values for 1 users"),
    "allow with a fraction": ({"allow": [1000.5]}, "invalid_request", "allow"),
    "allow of lists of lists": ({"allow": [[[1000]]]}, "invalid_request", "allow"),
    "allow of too many": ({"allow": [1000] * 101}, "limit", "items of allow: 101, at most 100"),
    "deny of everything": ({"deny": EVERYTHING}, "no_items_left", "widen"),
    "deny of everything for the user": ({"deny": [EVERYTHING]}, "no_items_left", "widen"),
    "deny and exclude_seen of everything": (
        {"deny": EVERYTHING[2:], "exclude_seen": True},
        "no_items_left",
        "widen",
    ),
    "deny of what is allowed": ({"allow": [1003], "deny": [1003]}, "no_items_left", "widen"),
    "seen of what is allowed": ({"allow": [1000], "exclude_seen": True}, "no_items_left", "widen"),
    "deny is text": ({"deny": "all"}, "invalid_request", "deny"),
    "deny of unknown ids": ({"deny": ["x"]}, "unknown_items", "'x'"),
    "deny for two users": ({"deny": [[1000], None]}, "invalid_request", "2 values for 1 users"),
    "deny of too many": ({"deny": [1000] * 101}, "limit", "items of deny: 101"),
    "events of a model without": ({"events": {"is_like": [[1, 0]]}}, "invalid_request", "is_like"),
    "events are a list": ({"events": [[1, 0]]}, "invalid_request", "events"),
    "events are null": ({"events": None}, "invalid_request", "events"),
    "an event column of text": ({"events": {"is_like": [["a", "b"]]}}, "invalid_request", "events.is_like.0.0"),
    "an event column of two users": (
        {"events": {"is_like": [[1, 0], [1]]}},
        "invalid_request",
        "2 values for 1 users",
    ),
    "an event column that is flat": ({"events": {"is_like": [1, 0]}}, "invalid_request", "events.is_like.0"),
    "user features of a model without": ({"users": {"age": [1]}}, "invalid_request", "users['age']"),
    "user features are a list": ({"users": [1]}, "invalid_request", "users"),
    "a user feature of two users": ({"users": {"age": [1, 2]}}, "invalid_request", "2 values for 1 users"),
    "a user feature that is flat": ({"users": {"age": 1}}, "invalid_request", "users.age"),
    "an argument of generate": ({"num_beams": 1000}, "invalid_request", "num_beams"),
    "an argument that is misspelt": ({"exclude_sen": True}, "invalid_request", "exclude_sen"),
    "an argument of the recommender that is not served": ({"item_scorer": "x"}, "invalid_request", "item_scorer"),
    "a name with a dot": ({"a.b": 1}, "invalid_request", "a.b"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body(http, name):
    change, code, message = BODIES[name]
    answer = http.post("/recommend", content=json.dumps(OK | change).encode(), headers=JSON)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == code and message in error["message"] and len(error["message"]) < 700
    assert http.post("/recommend", json=OK).status_code == 200


CONTENTS = {
    "nothing": b"",
    "no JSON": b"histories=1000",
    "half of a JSON": b'{"histories": [[1000',
    "a list": b"[[1000]]",
    "a number": b"7",
    "text": b'"histories"',
    "null": b"null",
    "NaN": b'{"histories": [[NaN]]}',
    "NaN as k": b'{"histories": [[1000]], "k": NaN}',
    "infinity in events": b'{"histories": [[1000]], "events": {"x": [[Infinity]]}}',
    "1e999 in events": b'{"histories": [[1000]], "events": {"x": [[1e999]]}}',
    "NaN as a user feature": b'{"histories": [[1000]], "users": {"x": [NaN]}}',
    "latin-1": '{"histories": [["é"]]}'.encode("latin-1"),
    "UTF-16": '{"histories": [["é"]]}'.encode("utf-16"),
    "zeros": b"\x00" * 100,
    "500 brackets": b"[" * 500 + b"]" * 500,
    "20,000 brackets": b"[" * 19_000,
    "nested objects": b'{"histories":' * 1000,
    "a number of 5,000 digits": b'{"histories": [[' + b"9" * 5000 + b"]]}",
    "a key that is there twice": b'{"histories": [[1000]], "histories": 7}',
    "a comment": b'{"histories": [[1000]] /* all */}',
    "a comma too many": b'{"histories": [[1000,]]}',
    "single quotes": b"{'histories': [[1000]]}",
    "a form": b"--x\r\nContent-Disposition: form-data; name=histories\r\n\r\n1000\r\n--x--",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_content(http, name):
    answer = http.post("/recommend", content=CONTENTS[name], headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["message"]
    assert http.post("/recommend", json=OK).status_code == 200


def test_a_large_body(http):
    """By its length, and, without one, by what comes; also of a path that does not take bodies."""
    large = json.dumps({"histories": [["x" * 100_000]]}).encode()
    parts = (large[i : i + 1000] for i in range(0, len(large), 1000))
    for content in (large, parts, b"x" * 10_000_000):
        answer = http.post("/recommend", content=content, headers=JSON)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert "at most 20000 are allowed" in answer.json()["error"]["message"]
    assert http.post("/recommend", json=OK).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/recommend", 405),
        ("PUT", "/recommend", 405),
        ("DELETE", "/model", 405),
        ("POST", "/info", 405),
        ("POST", "/health", 405),
        ("GET", "/", 404),
        ("GET", "/recommend/1", 404),
        ("GET", "/../../etc/passwd", 404),
        ("POST", "/%00", 404),
    ],
)
def test_a_bad_path(http, method, path, status):
    answer = http.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_kind_of_content(http, kind):
    """A web page may send these to a service on its reader's machine."""
    answer = http.post("/recommend", content=json.dumps(OK).encode(), headers={"content-type": kind})
    assert answer.status_code == 415 and "content-type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("length", ["x", "-1", "1e3"])
def test_a_bad_length(http, length):
    answer = http.post("/recommend", content=b"{}", headers={"content-length": length})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "content_length"


def test_unknown_items_can_be_ignored(http):
    body = {"histories": [[999, 1000, "x", 1001]], "unknown_items": "ignore"}
    expected = http.post("/recommend", json=OK).json()["results"]
    assert http.post("/recommend", json=body).json()["results"] == expected
