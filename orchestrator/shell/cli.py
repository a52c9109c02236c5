"""Placeholder until the commands land in this same change."""


def main() -> int:
    return 0
