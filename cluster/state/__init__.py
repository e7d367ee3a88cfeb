"""What gateways remember: responses, conversations, and the reasoning of clients that drop it, in
one SQL database that all copies of a gateway share."""
