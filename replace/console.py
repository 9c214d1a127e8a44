"""Where log lines go: a console whose progress bars they do not tear apart, and run.log."""

import logging
import sys

from tqdm import tqdm

from replace.secrets import blot


class Lenient(logging.Handler):
    """Keys are blotted out of its lines, and a disk or pipe that takes no more does not end a run."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as a line, without keys."""
        return blot(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """The line is lost where nothing can be written; everything else is told as logging does."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Console(Lenient):
    """A logging handler that writes above any open progress bar, to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            tqdm.write(self.format(record))
        except OSError:
            self.handleError(record)


class RunLog(Lenient, logging.FileHandler):
    """A logging handler that appends to a file."""
