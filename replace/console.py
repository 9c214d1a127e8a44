"""Log lines that do not tear progress bars apart."""

import logging

from tqdm import tqdm


class Console(logging.Handler):
    """A logging handler that writes above any open progress bar, to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record))
