"""``python -m hostd``. Kept thin: device processes import this module anew, and need nothing of what it starts."""

if __name__ == "__main__":
    from hostd.cli import main

    main()
