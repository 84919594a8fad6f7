"""The fetcher: resolves, fetches and verifies adapters in limited processes of their own."""
