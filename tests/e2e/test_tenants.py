"""Keys, limits and the ledger around the real engine: caches kept apart, counters that go, books that balance."""

import concurrent.futures
import json
import subprocess
import sys

import httpx2
import openai
import pytest

from services import free_port

PROMPT = "Numbers: " + " ".join(map(str, range(60)))


def tokenmill(*words):
    done = subprocess.run([sys.executable, "-m", "tokenmill", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_key(where, *words):
    return tokenmill("keys", "create", "test", *words, "--json", *where)


def client(server, secret):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0)


def cached(server, secret, **extra):
    answer = client(server, secret).completions.create(model="demo", prompt=PROMPT, max_tokens=1, extra_body=extra)
    return answer.usage.prompt_tokens_details.cached_tokens


def test_a_tenant_hits_no_cache_but_its_own_and_the_books_balance(serve, tmp_path):
    where = ("--state", str(tmp_path))
    port = free_port()
    first, second = make_key(where), make_key(where, "--requests-per-minute", "2")
    admin = make_key(where, "--scopes", "admin,metrics")
    flags = ("--auth", "--admin-port", str(port), "--dollars-per-hour", "3.6", *where)
    with serve("demo", "--served-model-name", "demo", *flags) as server:
        assert cached(server, first["key"]) == 0
        assert cached(server, first["key"]) > 0
        # Neither the same prompt nor a salt of its own choice reaches what another has cached.
        assert cached(server, second["key"]) == 0
        assert cached(server, second["key"], cache_salt=first["id"]) == 0
        assert cached(server, first["key"]) > 0
        with pytest.raises(openai.RateLimitError):
            cached(server, second["key"])
        with pytest.raises(openai.AuthenticationError):
            cached(server, "none")

        headers = {"authorization": f"Bearer {admin['key']}"}
        assert httpx2.get(f"{server.url}/admin/keys", headers=headers).status_code == 404
        assert httpx2.get(f"{server.url}/metrics", headers=headers).status_code == 404
        apart = f"http://127.0.0.1:{port}"
        assert "tokenmill:cost_dollars_total" in httpx2.get(f"{apart}/metrics", headers=headers).text
        assert len(httpx2.get(f"{apart}/admin/keys", headers=headers).json()["data"]) == 3
        assert httpx2.get(f"{apart}/v1/models", headers={"authorization": f"Bearer {first['key']}"}).status_code == 404

        # Made and revoked by another process, while the server runs.
        later = make_key(where)
        while (answer := httpx2.get(f"{server.url}/v1/models", headers={"x-api-key": later["key"]})).status_code != 200:
            assert answer.status_code == 401
        tokenmill("keys", "revoke", later["id"], *where, "--json")
        while httpx2.get(f"{server.url}/v1/models", headers={"x-api-key": later["key"]}).status_code == 200:
            pass
        assert server.stop() == 0

    used = {row["key_id"]: row for row in tokenmill("usage", *where, "--json")}
    assert {key: row["requests"] for key, row in used.items()} == {first["id"]: 3, second["id"]: 2}
    requests = tokenmill("usage", "--by", "request", *where, "--json")
    assert all(row["dollars"] == pytest.approx(row["total_s"] / 1000, rel=0.2) for row in requests)
    assert used[first["id"]]["cached_tokens"] > 0 == used[second["id"]]["cached_tokens"]


def test_keys_may_share_their_caches_if_the_operator_says_so(serve, tmp_path):
    where = ("--state", str(tmp_path))
    first, second = make_key(where), make_key(where)
    flags = ("--auth", "--no-salt-caches", *where)
    with serve("demo", "--served-model-name", "demo", *flags) as server:
        assert cached(server, first["key"]) == 0
        assert cached(server, second["key"]) > 0


def test_postgresql_and_redis_go_and_come_while_requests_run(serve, tmp_path, postgres_server, redis_server):
    where = ("--database", postgres_server.url, "--state", str(tmp_path))
    key = make_key(where, "--concurrency", "100")
    flags = ("--auth", "--redis", redis_server.url, *where)
    with serve("demo", "--served-model-name", "demo", *flags) as server:
        ask = client(server, key["key"]).completions.create

        def one(number):
            return ask(model="demo", prompt=f"{number}:", max_tokens=4, temperature=0).id

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(one, range(20)))
            postgres_server.stop(kill=True)
            redis_server.stop(kill=True)
            try:
                answers += pool.map(one, range(20, 60))
            finally:
                postgres_server.start()
                redis_server.start()
            answers += pool.map(one, range(60, 80))
        assert server.stop() == 0
    assert len(set(answers)) == 80
    rows = tokenmill("usage", "--by", "request", *where, "--json")
    assert sorted(row["request_id"].removesuffix("-0") for row in rows) == sorted(answers)
