"""The processes that compute: start, call, watch, end; one group per layout."""
