"""Batches of pairs, written out by hand."""

from __future__ import annotations

from rlhf.collate import EncodedPair, token_ids
from rlhf.pair_batches import pack_divergent, pack_pairs, pad_pairs

PAD, EOS = 0, 9
PAIRS = [
    EncodedPair("pair", prompt=token_ids([1]), chosen=token_ids([2, EOS]), rejected=token_ids([3, 3, EOS])),
    EncodedPair("pair", prompt=token_ids([4]), chosen=token_ids([5, EOS]), rejected=token_ids([6, EOS])),
]


def test_a_pair_has_its_prompt_once_and_is_read_at_both_ends() -> None:
    batch = pack_pairs(PAIRS)
    assert batch.packed.ids_N.tolist() == [1, 2, EOS, 3, 3, EOS, 4, 5, EOS, 6, EOS]
    assert batch.packed.positions_N.tolist() == [0, 1, 2, 1, 2, 3, 0, 1, 2, 1, 2]
    assert batch.packed.kept is not None
    assert batch.packed.kept.index_K.tolist() == [2, 5, 8, 10]
    assert (batch.counted, batch.tokens) == (2, 3 + 4 + 3 + 3)
    assert PAIRS[0].length == 4


def test_padded_pairs_are_stacked_chosen_first() -> None:
    batch = pad_pairs(PAIRS, pad_id=PAD)
    assert batch.ids_BT.tolist() == [[1, 2, EOS, PAD], [4, 5, EOS, PAD], [1, 3, 3, EOS], [4, 6, EOS, PAD]]
    assert batch.mask_BT.sum(dim=1).tolist() == [3, 3, 4, 3]
    assert (batch.counted, batch.tokens) == (2, 13)


def test_one_padding_token_stands_for_all_after_the_shorter_of_a_pair() -> None:
    batch = pack_divergent(PAIRS, pad_id=PAD)
    assert batch.packed.ids_N.tolist() == [1, 2, EOS, PAD, 3, 3, EOS, 4, 5, EOS, 6, EOS]
    # It stands where EOS does, sees prompt and summary, and is not seen.
    assert batch.packed.positions_N.tolist() == [0, 1, 2, 2, 1, 2, 3, 0, 1, 2, 1, 2]
    assert batch.packed.seen_B1TT is not None
    assert batch.packed.seen_B1TT[0, 0, 3].tolist() == [True, True, True, False, False, False, False]
    assert not batch.packed.seen_B1TT[0, 0, 4:, 3].any()
    # Chosen first: [2, EOS, PAD] are the scores 0 to 2, [3, 3, EOS] are 3 to 5, [5, EOS] 6 and 7, [6, EOS] 8 and 9.
    assert batch.read_BR.tolist() == [[0, 1, 2], [6, 7, 7], [3, 4, 5], [8, 9, 9]]
    assert batch.mask_BR.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert (batch.counted, batch.tokens) == (2, 13)
