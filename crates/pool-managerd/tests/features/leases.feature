Feature: Leases
  A lease is the right to use one slot of an engine. There are never more leases than slots.

  Background:
    Given a pool "chat" that starts with the daemon
    And it takes 1 request at a time
    When the daemon runs
    And pool "chat" is ready

  Scenario: A lease tells where the engine is, and the engine answers there
    When client "ann" gets a lease of "chat"
    Then the engine answers at the address in the lease of "ann"
    And 1 lease is held

  Scenario: When every slot is taken, a client is told when to come back
    When client "ann" gets a lease of "chat"
    Then a lease is refused with "POOL_SATURATED" and says when to come back
    And 1 lease is held

  Scenario: Whoever waits is served in the order of asking
    When client "ann" gets a lease of "chat"
    And client "bob" waits for a lease of "chat"
    And client "cid" waits for a lease of "chat"
    And client "ann" releases the lease
    Then client "bob" gets the lease
    And client "cid" still waits
    When client "bob" releases the lease
    Then client "cid" gets the lease

  Scenario: Waiting ends in time
    When client "ann" gets a lease of "chat"
    And client "bob" waits for a lease of "chat" for at most 100ms
    Then client "bob" is refused with "POOL_SATURATED"
    And nobody waits

  Scenario: A lease that is not renewed ends by itself
    When client "ann" gets a lease of "chat" for 300ms
    And client "bob" asks for a lease of "chat"
    Then client "bob" gets the lease
    And client "ann" cannot renew, because of "LEASE_NOT_FOUND"
    And 1 lease is held

  Scenario: A lease is renewed as long as it is needed
    When client "ann" gets a lease of "chat"
    And client "ann" renews the lease
    Then the lease of "ann" ends later than before

  Scenario: Releasing twice is fine, and frees one slot once
    When client "ann" gets a lease of "chat"
    And client "ann" releases the lease
    And client "bob" gets a lease of "chat"
    And client "ann" releases the lease
    Then 1 lease is held
    And a lease is refused with "POOL_SATURATED" and says when to come back

  Scenario: A lease that never was cannot be released
    Then releasing "lease-chat-r0-g9-0000000000000000-7" is refused with "LEASE_NOT_FOUND"
