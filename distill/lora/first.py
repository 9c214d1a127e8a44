"""Unsloth before transformers, where the tuning will be Unsloth's: it patches what it finds when imported."""

import logging
import sys

from distill.lora.choice import choose, this_machine
from replace.config import Config

logger = logging.getLogger(__name__)


def import_unsloth_first(config: Config) -> None:
    """Import Unsloth if `config.lora` will use it here; where that fails, the tuning says so later."""
    if "unsloth" in sys.modules or not config.budget.lora.tokens:
        return
    if choose(config.lora, this_machine()).kind == "unsloth":
        from distill.lora.patching import import_unsloth

        try:
            import_unsloth()
        except (ImportError, NotImplementedError, RuntimeError, AttributeError, OSError) as error:
            logger.warning("lora: Unsloth cannot be imported here (%s)", error)
