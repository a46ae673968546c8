"""``python -m hostd``. Kept thin: device processes import this module anew, and need nothing of what it starts."""

import os
import sys

if __name__ == "__main__":
    if "--die-with-parent" in sys.argv:
        from protocols.transport.kernel import die_with_parent

        die_with_parent(os.getppid())  # before the rest is even imported
    from hostd.cli import main

    main()
