import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_jax.train import DataError, Document, Windows, batch_at, windows

PAD = 9999


@st.composite
def documents(draw):
    """Documents whose tokens are all different, so that each can be found again."""
    made, token = [], 0
    for size in draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)):
        flags = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        weights = np.array(flags, np.float32)
        weights[0] = 0.0
        made.append(Document(np.arange(token, token + size), weights, bytes=size))
        token += size
    return made


def owner(documents):
    """token -> its document."""
    return {
        int(token): number
        for number, document in enumerate(documents)
        for token in document.ids
    }


@settings(deadline=None)  # processors are shared
@given(made=documents(), length=st.integers(1, 24), pack=st.booleans())
def test_every_token_that_counts_is_predicted_once(made, length, pack):
    if not any(document.weights.any() for document in made):
        with pytest.raises(DataError, match=f"No token counts in {len(made)} docum"):
            windows(made, length=length, pack=pack)
        return
    found = windows(made, length=length, pack=pack, pad_id=PAD)
    assert found.ids.shape == (found.rows, found.weights.shape[1] + 1)
    assert found.weights.shape[1] <= length
    predicted = found.ids[:, 1:][found.weights > 0]
    wanted = np.concatenate([d.ids[d.weights > 0] for d in made])
    assert sorted(predicted.tolist()) == sorted(wanted.tolist())
    assert found.weights.any(axis=1).all()


@settings(deadline=None)
@given(made=documents(), length=st.integers(1, 24), pack=st.booleans())
def test_nothing_is_predicted_from_another_document(made, length, pack):
    if not any(document.weights.any() for document in made):
        return
    found = windows(made, length=length, pack=pack, pad_id=PAD)
    document_of = owner(made)
    for ids, weights in zip(found.ids, found.weights, strict=True):
        for before, token, weight in zip(ids[:-1], ids[1:], weights, strict=True):
            if weight:
                assert token == before + 1
                assert document_of[int(token)] == document_of[int(before)]
        if not pack:
            assert len({document_of[int(i)] for i in ids if i != PAD}) == 1
            real = ids != PAD
            assert (real[:-1] >= real[1:]).all()  # padding stands on the right


@settings(deadline=None)
@given(made=documents(), length=st.integers(1, 24))
def test_packing_loses_no_piece_and_saves_rows(made, length):
    if not any(document.weights.any() for document in made):
        return
    apart = windows(made, length=length, pad_id=PAD)
    packed = windows(made, length=length, pack=True, pad_id=PAD)
    assert packed.rows <= apart.rows

    def tokens(found):
        return sorted(found.ids[found.ids != PAD].tolist())

    assert tokens(packed) == tokens(apart)


def document(size):
    return Document(np.arange(size), np.float32(np.arange(size) > 0), bytes=size)


def test_short_documents_make_short_rows():
    assert windows([document(5), document(17)], length=512).weights.shape == (2, 16)
    assert windows([document(5), document(18)], length=512).weights.shape == (2, 32)
    assert windows([document(600)], length=512).weights.shape == (2, 512)


def test_packing_fills_rows():
    found = windows([document(8)] * 9, length=15, pack=True)
    assert found.rows == 5
    assert found.weights.sum() == 9 * 7


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_that_is_none(length):
    with pytest.raises(DataError, match=f"`length` = {length}; a row predicts at le"):
        windows([document(5)], length=length)


@settings(deadline=None)
@given(rows=st.integers(1, 20), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_epoch_sees_every_row_once(rows, size, seed):
    found = Windows(np.arange(rows)[:, None], np.zeros((rows, 0)))
    batches = [batch_at(found, i, size=size, seed=seed) for i in range(rows)]
    stream = np.concatenate([batch.ids[:, 0] for batch in batches])
    for epoch in stream.reshape(size, rows):
        assert sorted(epoch.tolist()) == list(range(rows))


def test_a_batch_depends_on_its_number_alone():
    found = Windows(np.arange(50)[:, None], np.zeros((50, 0)))
    for number in (7, 3, 7):
        again = batch_at(found, number, size=8, seed=1)
        assert (again.ids == batch_at(found, number, size=8, seed=1).ids).all()
    one = batch_at(found, 0, size=50, seed=1).ids
    assert (one != batch_at(found, 0, size=50, seed=2).ids).any()
    assert (one != batch_at(found, 1, size=50, seed=1).ids).any()
