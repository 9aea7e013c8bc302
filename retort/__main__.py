"""`python -m retort`."""

from retort.cli import main

raise SystemExit(main())
