"""Keys: made, recognized from memory, rotated, revoked; and what happens while their database is away."""

import hashlib
import threading

import pytest
import sqlalchemy

from tokenmill.errors import RequestError, UnavailableError
from tokenmill.server.config import StoreConfig
from tokenmill.server.principal import Limits
from tokenmill.server.tenancy.keys import Keyring, Keys, KeySpec, limits_of
from tokenmill.server.tenancy.store import KEYS, Store


class Clock:
    time = 1_000_000.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(store, clock):
    return Keys(store, clock)


@pytest.fixture
def keyring(keys):
    return Keyring(keys)


SPEC = KeySpec(
    name="agents",
    scopes=frozenset({"inference", "metrics"}),
    models=frozenset({"demo"}),
    priority=-3,
    limits=Limits(requests_per_minute=60, dollars_per_day=2.5),
    owner="Ada",
    note="for the night",
)


def test_a_key_is_256_random_bits_with_its_id_and_only_its_hash_is_stored(keys, store):
    key, secret = keys.create(SPEC)
    prefix, key_id, random = secret.split("-", 2)
    assert (prefix, key_id, len(random)) == ("tm", key.id, 43)  # 43 letters of 6 bits
    with store.reading() as connection:
        [row] = connection.execute(sqlalchemy.select(KEYS)).mappings()
    assert row["hash"] == hashlib.sha256(secret.encode()).hexdigest()
    assert random not in repr(dict(row))
    assert row["hash"] not in repr(key)
    assert keys.create(SPEC)[1] != secret


def test_what_was_decided_about_a_key_comes_back(keys, keyring, clock):
    key, secret = keys.create(SPEC)
    assert keys.get(key.id).spec == SPEC
    keyring.refresh()
    principal = keyring.recognize(secret)
    assert (principal.key_id, principal.name, principal.scopes) == (key.id, "agents", SPEC.scopes)
    assert (principal.models, principal.priority, principal.limits) == (SPEC.models, -3, SPEC.limits)
    shown = key.to_json(clock())
    assert shown["limits"]["requests_per_minute"] == 60
    assert (shown["status"], shown["owner"], shown["note"]) == ("active", "Ada", "for the night")
    assert "hash" not in shown
    assert "salt" not in shown


def test_what_is_no_key_is_not_recognized(keys, keyring):
    key, secret = keys.create(SPEC)
    keyring.refresh()
    other = keys.create(SPEC)[1].rpartition("-")[2]
    for wrong in (
        "", "tm-", "none", key.id, secret[:-1], secret + "x", secret + "\n", f" {secret}", secret.upper(), "\ud800",
        f"tm-{key.id}-{other}", f"tm-{'0' * 12}-{'A' * 43}", f"tm-{key.id}-" + "é" * 43, "x" * 100_000,
    ):  # fmt: skip
        assert keyring.recognize(wrong) is None
    assert keyring.recognize(secret) is not None


def test_every_guess_is_compared_in_constant_time_whether_its_id_exists_or_not(keys, keyring, monkeypatch):
    _, secret = keys.create(SPEC)
    keyring.refresh()
    compared = []
    from tokenmill.server.tenancy import keys as module

    compare = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    for guess in (secret, secret[:-1] + "x", f"tm-{'0' * 12}-{'A' * 43}", "nonsense"):
        compared.clear()
        keyring.recognize(guess)
        assert [(len(a), len(b)) for a, b in compared] == [(64, 64)] * 2


def test_a_rotated_key_is_good_beside_its_successor_for_the_grace_time(keys, keyring, clock):
    key, first = keys.create(SPEC)
    rotated, second = keys.rotate(key.id, grace_s=60)
    assert rotated.id == key.id
    keyring.refresh()
    salt = keyring.recognize(first).salt
    assert keyring.recognize(second).salt == salt  # its cached prefixes stay its own
    clock.time += 59.9
    assert keyring.recognize(first)
    clock.time += 0.1
    assert keyring.recognize(first) is None
    assert keyring.recognize(second)
    _, third = keys.rotate(key.id, grace_s=0)
    keyring.refresh()
    assert keyring.recognize(second) is None
    assert keyring.recognize(third)


def test_a_key_ends_when_it_expires(keys, keyring, clock):
    key, secret = keys.create(KeySpec(name="short", expires=clock() + 10))
    keyring.refresh()
    assert keyring.recognize(secret)
    clock.time += 10
    assert keyring.recognize(secret) is None
    assert keys.get(key.id).status(clock()) == "expired"
    with pytest.raises(RequestError) as caught:
        keys.rotate(key.id, 0)
    assert caught.value.code == "key_not_active"


def test_a_revoked_key_is_refused_for_good_with_its_predecessor(keys, keyring, clock):
    key, first = keys.create(SPEC)
    _, second = keys.rotate(key.id, grace_s=1000)
    when = clock()
    keys.revoke(key.id)
    clock.time += 5
    assert keys.revoke(key.id).revoked == when  # again is no error and changes nothing
    keyring.refresh()
    assert keyring.recognize(first) is None
    assert keyring.recognize(second) is None
    with pytest.raises(RequestError, match="revoked"):
        keys.rotate(key.id, 0)


def test_each_key_has_a_salt_that_nobody_can_tell_from_its_id(keys):
    made = [keys.create(SPEC)[0] for _ in range(3)]
    ring = Keyring(keys, salted=True)
    ring.refresh()
    salts = {key.salt for key in made}
    assert len(salts) == 3
    assert not any(key.id in key.salt for key in made)
    unsalted = Keyring(keys, salted=False)
    secret = keys.create(SPEC)[1]
    unsalted.refresh()
    assert unsalted.recognize(secret).salt == ""


@pytest.mark.parametrize(
    "key_id", ["", "0" * 12, "../../etc/passwd", "' OR 1=1 --", "%", "\x00", "x" * 10_000, "é\ud83d"]
)
def test_an_id_that_is_none_is_not_found(key_id, tmp_path):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    keys = Keys(store)
    keys.create(SPEC)
    for action in (keys.get, keys.revoke, lambda key_id: keys.rotate(key_id, 0)):
        with pytest.raises(RequestError) as caught:
            action(key_id)
        assert caught.value.code == "key_not_found"
    assert len(keys.all()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""), ("name", "  "), ("name", "x" * 201), ("name", "a\nb"), ("owner", "\x00"), ("note", "\ud800"),
        ("scopes", frozenset()), ("scopes", frozenset({"root"})), ("models", frozenset()), ("priority", 2**31),
    ],
)  # fmt: skip
def test_what_cannot_be_a_key_is_refused_by_field(field, value):
    with pytest.raises(RequestError) as caught:
        KeySpec(**{"name": "x", field: value})
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", field)


@pytest.mark.parametrize("name", ["../../x", "=1+1", "<b>", "'; DROP TABLE keys; --", "日本", "[red]x[/red]", "a/b\\c"])
def test_odd_names_are_kept_as_they_are(name, keys):
    key, _ = keys.create(KeySpec(name=name, owner=name, note=name))
    assert keys.get(key.id).spec.name == name


@pytest.mark.parametrize("values", [{"requests_per_minute": 0}, {"concurrency": -1}, {"tokens_per_day": 1.5},
                                    {"dollars_per_day": float("inf")}, {"dollars_per_day": float("nan")},
                                    {"tokens_per_minute": True}, {"tokens_per_minut": 1}])  # fmt: skip
def test_limits_are_positive_numbers(values):
    with pytest.raises(RequestError) as caught:
        limits_of(values)
    assert caught.value.field == next(iter(values))


def test_changes_by_many_at_once_are_all_seen_by_one_who_reads_what_is_new(keys, keyring):
    """Numbers of changes become visible in their order: a reader that has seen one has seen all before it."""
    secrets = []
    done = threading.Event()

    def make():
        secrets.extend(keys.create(SPEC)[1] for _ in range(5))

    def read():
        while not done.is_set():
            keyring.refresh()

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=make) for _ in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    keyring.refresh()
    assert len(secrets) == 20
    assert all(keyring.recognize(secret) for secret in secrets)
    assert sorted(key.version for key in keys.all()) == list(range(1, 21))


def test_of_two_rotations_at_once_one_is_told_so(keys, monkeypatch):
    key, _ = keys.create(SPEC)
    get = keys.get

    def get_and_be_overtaken(key_id):
        found = get(key_id)
        monkeypatch.setattr(keys, "get", get)
        keys.rotate(key_id, 0)
        return found

    monkeypatch.setattr(keys, "get", get_and_be_overtaken)
    with pytest.raises(RequestError) as caught:
        keys.rotate(key.id, 0)
    assert caught.value.code == "key_changed"


def test_known_keys_stay_good_while_the_database_is_away(postgres_server, caplog, monkeypatch):
    monkeypatch.setattr("tokenmill.server.tenancy.keys.REFRESH_S", 0.05)
    store = Store(StoreConfig(database=postgres_server.url))
    store.migrate()
    keys = Keys(store)
    key, secret = keys.create(SPEC)
    keyring = Keyring(keys)
    keyring.start()
    try:
        postgres_server.stop()
        try:
            with pytest.raises(UnavailableError):
                keyring.refresh()
            while "Keys that are known stay good" not in caplog.text:
                keyring._closing.wait(0.01)
            assert keyring.recognize(secret).key_id == key.id
            with pytest.raises(UnavailableError):
                keys.create(SPEC)
        finally:
            postgres_server.start()
        _, later = keys.create(SPEC)
        keys.revoke(key.id)
        while keyring.recognize(secret) or not keyring.recognize(later):  # without a restart
            keyring._closing.wait(0.01)
        assert "the database of keys is back" in caplog.text
    finally:
        keyring.close()
        store.close()


def test_without_its_database_a_keyring_does_not_start():
    keyring = Keyring(Keys(Store(StoreConfig(database="postgresql://x@127.0.0.1:9/x"))))
    with pytest.raises(UnavailableError) as caught:
        keyring.start()
    assert caught.value.code == "database_unavailable"
    keyring.close()
