"""For people who look: pages in a browser, in an environment of its own."""
