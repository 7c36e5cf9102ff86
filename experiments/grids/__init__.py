"""One file a research question, each with `def grid() -> Iterator[Config]`."""
