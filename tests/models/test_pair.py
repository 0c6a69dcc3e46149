"""A pair is the tuple it was, with names for its sides."""

import copy
import pickle

from theseus_transport.models.pair import SIDES, Pair


def test_a_pair_is_a_tuple_with_names() -> None:
    pair = Pair([1], [2])
    source, target = pair
    assert (source, target) == (pair.source, pair.target) == (pair[0], pair[1]) == ([1], [2]) == pair
    for again in (copy.copy(pair), copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert type(again) is Pair and again == pair


def test_both_sides_are_made_in_order() -> None:
    seen: list[str] = []
    assert SIDES.map(lambda side: seen.append(side) or len(side)) == Pair(6, 6)
    assert seen == ["source", "target"] == list(SIDES)
    assert SIDES.zip((1, 2)) == (("source", 1), ("target", 2))
