import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_jax.train import DataError, Text, split


def texts(count):
    return [Text(f"text {i}", f"line {i}") for i in range(count)]


@settings(deadline=None)  # processors are shared
@given(
    count=st.integers(2, 50), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**31)
)
def test_records_go_to_one_side_each(count, share, seed):
    records = texts(count)
    train, heldout = split(records, share=share, seed=seed)
    assert train and heldout
    assert sorted([*train, *heldout], key=records.index) == records
    assert train == sorted(train, key=records.index)
    assert (train, heldout) == split(records, share=share, seed=seed)


def test_the_seed_decides():
    assert split(texts(50), seed=0) != split(texts(50), seed=1)


@settings(deadline=None)
@given(text=st.text(min_size=20), share=st.floats(0.1, 0.9))
def test_a_text_is_cut_once(text, share):
    try:
        (train,), (heldout,) = split([Text(text, "a.txt")], share=share)
    except DataError as error:
        assert "too little" in str(error)
    else:
        assert train.text + heldout.text == text


def test_a_text_is_cut_between_paragraphs_and_by_no_seed():
    text = "\n\n".join(f"paragraph {i}\nwith two lines" for i in range(40))
    train, heldout = split([Text(text, "a.txt")], share=0.2, seed=1)
    assert heldout[0].text.startswith("paragraph ")
    assert 0.15 < len(heldout[0].text) / len(text) < 0.25
    assert split([Text(text, "a.txt")], share=0.2, seed=2) == (train, heldout)


def test_nothing_held_out():
    assert split(texts(1), share=0) == (texts(1), [])


def test_too_little():
    with pytest.raises(DataError, match=r"line 0: too little to hold 10% out"):
        split([Text("a", "line 0")])


def test_a_share_that_is_none():
    with pytest.raises(DataError, match=r"`share` = 1; a number from 0 up to 1"):
        split(texts(3), share=1)
