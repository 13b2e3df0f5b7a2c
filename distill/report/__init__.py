"""From measurements to intervals, tables, plots and one self-contained page."""
