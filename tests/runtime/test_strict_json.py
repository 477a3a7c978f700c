import pytest

from runtime.strict_json import parse_json, read_list, read_object


def test_plain_json_is_read_as_usual():
    assert parse_json('{"a": [1, 2.5, null, true, {"b": "c"}]}') == {
        "a": [1, 2.5, None, True, {"b": "c"}]
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not whole, valid JSON"),
        ('{"a": 1', "not whole, valid JSON"),
        ("1 2", "Extra data"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' is given more than once"),
        ("[NaN]", "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number of JSON"),
        ("[" * 100_000, "not whole, valid JSON"),
    ],
)
def test_what_is_not_one_whole_json_value_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_members_that_are_right_are_kept_and_all_others_told():
    problems: list[str] = []
    kinds = {"size": (int,), "name": (str, type(None)), "ratio": (float,)}
    data = {"size": True, "name": None, "color": 1}
    assert read_object(data, "box", kinds, problems) == {"name": None}
    assert problems == [
        "box.ratio is missing",
        "box.color is an unknown key",
        "box.size is true or false, expected a whole number",
    ]


def test_an_item_of_a_list_is_named_by_its_index():
    problems: list[str] = []
    assert read_list([{"size": 1}, 2], "boxes", {"size": (int,)}, problems) == [{"size": 1}, {}]
    assert problems == ["boxes[1] is a whole number, expected an object"]
