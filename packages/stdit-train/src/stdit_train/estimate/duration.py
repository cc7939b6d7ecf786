"""Say how long something takes."""

HOUR, DAY, YEAR = 3600, 86_400, 365.25 * 86_400


def duration(seconds: float) -> str:
    """Format seconds for people: "0.12 seconds", "40 seconds", "2.8 minutes", "3.1 hours", "12 days", "1,952 years"."""
    if seconds < 60:
        return f"{seconds:.2g} seconds" if seconds < 9.5 else f"{seconds:.0f} seconds"
    if seconds < 1.5 * HOUR:
        return f"{seconds / 60:.1f} minutes"
    if seconds < 2 * DAY:
        return f"{seconds / HOUR:.1f} hours"
    return f"{seconds / DAY:,.0f} days" if seconds < 2 * YEAR else f"{seconds / YEAR:,.0f} years"
