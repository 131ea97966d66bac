"""The demo: a generated task with exact-match scoring."""
