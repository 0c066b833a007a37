"""A rule in words."""

from nanhunt.health import Rule


def tell(rule: Rule) -> str:
    """The title, when the rule applies, what to do, and what others call it."""
    known = f"\nalso known as: {rule.known_as}" if rule.known_as else ""
    return f"{rule.slug}: {rule.title}\n{rule.when}\nto do: {rule.advice}{known}"
