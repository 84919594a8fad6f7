"""Linears whose weight is stored in fewer bits than it is computed with."""
