"""What people type: talk to a server and its adapters, check an adapter before it is deployed."""
