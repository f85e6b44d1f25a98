"""The page that `report` writes: records read, figures drawn, templates filled in."""
