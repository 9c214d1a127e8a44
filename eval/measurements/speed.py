"""What reading and writing cost against the length of the context; see `eval.speed.costs`."""

from eval.measurements import MEASUREMENTS
from eval.speed import costs
from eval.stream import PIECE
from replace.config import Config


@MEASUREMENTS.register("speed")
def speed(model, tokenizer, config: Config, using) -> dict:
    """{"cost": {"rows": of `costs`, "piece": tokens of one forward while a text is read}}."""
    rows = costs(model, sorted(config.eval.speed_lengths))
    return {"cost": {"rows": rows, "piece": PIECE}}
