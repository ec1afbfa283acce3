"""Times of the atlas in a browser. Not measured yet: it needs a browser and a run with many features, so its values are null."""
from _bench import report


def measure(quick):
    names = ("first_table_s", "search_ms", "feature_page_ms")
    return "not measured", {}, {}, dict.fromkeys(names)


report("atlas", measure)
