"""What a run folder holds, as one HTML page.

`record` reads it; `chart`, `text` and `evaluations` draw parts; `page` puts them together.
"""
