"""`unitok serve`: a bundle behind the endpoints that existing clients speak to, and a page."""
