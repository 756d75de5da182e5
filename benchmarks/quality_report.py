"""Tables and the plot of what ``quality.py`` measured."""
