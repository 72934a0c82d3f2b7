"""The library behind the five stages. It never imports them."""
