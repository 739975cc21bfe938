Feature: Drain
  A drain refuses new leases at once, waits for the running ones until its deadline, stops the engine, and leaves the
  pool on hold: nobody wakes it but the operator.

  Background:
    Given a pool "chat" that starts with the daemon
    When the daemon runs
    And pool "chat" is ready

  Scenario: A drain waits for running leases and refuses new ones
    When client "ann" gets a lease of "chat"
    And the operator drains "chat" within 10m
    Then pool "chat" is draining
    And a lease is refused with "POOL_DRAINING" and says when to come back
    And 1 lease is held
    When client "ann" releases the lease
    Then the operation succeeds
    And pool "chat" rests on hold
    And its engine is gone

  Scenario: At its deadline a drain revokes what is left
    When client "ann" gets a lease of "chat"
    And the operator drains "chat" within 200ms
    Then the operation succeeds
    And 0 leases are held
    And its engine is gone
    And client "ann" cannot renew, because of "LEASE_NOT_FOUND"

  Scenario: A drain that is to be given up at its deadline leaves everything as it was
    When client "ann" gets a lease of "chat"
    And the operator drains "chat" within 200ms or not at all
    Then the operation fails
    And pool "chat" is ready
    And it has the same engine as before
    And 1 lease is held

  Scenario: Demand does not wake a pool on hold, the operator does
    When the operator drains "chat" within 10m
    Then the operation succeeds
    And a lease is refused with "POOL_DRAINING" and says when to come back
    And pool "chat" rests on hold
    When the operator resumes "chat"
    Then pool "chat" is ready
    And it is served by engine number 2

  Scenario: A running drain can be called off
    When client "ann" gets a lease of "chat"
    And the operator drains "chat" within 10m
    And pool "chat" is draining
    And the operator resumes "chat"
    Then pool "chat" is ready
    And it has the same engine as before
    And 1 lease is held

  Scenario: There is nothing to drain in a pool that does not exist
    When the operator drains "nobody" within 10m
    Then it is refused with "POOL_NOT_FOUND"
