"""Tables as text: every cell under its head."""

from zeda_megatron.text_table import markdown_table, text_table


def test_columns_are_in_line():
    rows = [["layer", "share", "note"], ["1", "12.5", "long enough"], ["10", "7"], ["all"]]
    assert text_table(rows, "lrl", "  ") == [
        "  layer  share  note",
        "  1       12.5  long enough",
        "  10         7",
        "  all",
    ]
    assert text_table([["", "a"], ["bb", "100"]]) == ["      a", "bb  100"]
    assert text_table([]) == []


def test_markdown_has_a_rule_under_its_head():
    assert markdown_table(["", "a"], [["b", "1"]]) == ["|  | a |", "|---|---|", "| b | 1 |"]
