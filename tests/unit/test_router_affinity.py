"""Session affinity: bounded, forgets by time and by use, the later binding wins."""

from core.ids import WorkerId
from router.forwarding.affinity import SessionAffinity, SessionBinding
from router.forwarding.config import AffinityConfig

P, D, OTHER = (WorkerId(name) for name in ("p", "d", "other"))


def test_a_session_goes_where_it_was_until_it_is_forgotten() -> None:
    affinity = SessionAffinity(AffinityConfig(ttl_s=10.0))
    affinity.bind("s", P, D, now=1.0)
    assert affinity.of("s", 10.9) == SessionBinding(P, D, 11.0)
    affinity.bind("s", None, D, now=10.9)
    assert affinity.of("s", 20.0) == SessionBinding(None, D, 20.9)
    assert affinity.of("s", 20.9) is None
    assert len(affinity) == 0


def test_the_least_recently_used_goes_first() -> None:
    affinity = SessionAffinity(AffinityConfig(max_sessions=3))
    for name in ("a", "b", "c", "a", "d"):
        affinity.bind(name, P, D, now=0.0)
    assert [name for name, _ in affinity.items(1.0)] == ["d", "a", "c"]
    assert affinity.of("b", 1.0) is None


def test_a_peers_binding_is_taken_over_unless_ours_is_of_later_use() -> None:
    told: list[str] = []
    affinity = SessionAffinity(AffinityConfig(ttl_s=10.0))
    affinity.on_bound = told.append
    affinity.bind("s", P, D, now=5.0)
    affinity.adopt("s", OTHER, OTHER, expires_in_s=3.0, now=6.0)
    assert affinity.of("s", 6.0) == SessionBinding(P, D, 15.0)
    affinity.adopt("s", OTHER, OTHER, expires_in_s=9.5, now=6.0)
    assert affinity.of("s", 6.0) == SessionBinding(OTHER, OTHER, 15.5)
    affinity.adopt("t", OTHER, OTHER, expires_in_s=1e9, now=6.0)
    assert affinity.of("t", 16.0) is None, "nobody's word binds for ever"
    affinity.adopt("u", OTHER, OTHER, expires_in_s=0.0, now=6.0)
    assert affinity.of("u", 6.0) is None
    assert told == ["s"], "only what this gateway itself bound is told on"
