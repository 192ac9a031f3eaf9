// message_passing
