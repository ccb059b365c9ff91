"""Plain tests on the `measurement` fixture of properties that every residual stream has.

Write a plain test where a claim is not one metric against one number; all other claims belong in a TOML file.
The docstring is the claim that tables show.
"""


def test_ranks_are_ordered(measurement):
    """stable rank <= participation ratio <= effective rank, in every layer"""
    for layer in range(measurement.record.model.layers):
        scope = f"layer:{layer}"
        stable = measurement.value("stable_rank", scope)
        participation = measurement.value("participation_ratio", scope)
        assert stable <= participation * (1 + 1e-9)
        assert participation <= measurement.value("effective_rank", scope) * (1 + 1e-9)


def test_the_stream_grows(measurement):
    """the stream's norm in phase E is larger than in phase C (norm growth, Heimersheim & Turner 2023)"""
    assert measurement.value("stream_norm", "E") > measurement.value("stream_norm", "C")
