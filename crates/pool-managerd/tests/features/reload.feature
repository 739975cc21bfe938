Feature: Reload
  A reload ends with the new engine ready, or with the old one as it was.

  Background:
    Given a pool "chat" that starts with the daemon
    And it serves the model "stub:old"
    When the daemon runs
    And pool "chat" is ready

  Scenario: In place, the old engine is stopped before the new one starts
    When the operator reloads "chat" with the model "stub:new" in place
    Then the operation succeeds
    And pool "chat" serves the model "stub:new"
    And the engine of before is gone
    And it is at revision 2

  Scenario: In place waits for leases, and gives up at its deadline
    When client "ann" gets a lease of "chat"
    And the operator reloads "chat" with the model "stub:new" in place within 200ms
    Then the operation fails
    And pool "chat" serves the model "stub:old"
    And it has the same engine as before
    And 1 lease is held

  Scenario: With overlap the old engine serves its leases while the new one takes the next
    When client "ann" gets a lease of "chat"
    And the operator reloads "chat" with the model "stub:new" with overlap
    And client "bob" gets a lease on the new engine of "chat"
    Then the engine answers at the address in the lease of "ann"
    And the engine answers at the address in the lease of "bob"
    When client "ann" releases the lease
    Then the operation succeeds
    And pool "chat" serves the model "stub:new"
    And the engine of before is gone

  Scenario Outline: A reload that fails leaves the old engine as it was
    When the operator reloads "chat" with an engine that serves something else <how>
    Then the operation fails
    And pool "chat" serves the model "stub:old"
    And it is at revision 1
    And a client gets an answer from its engine

    Examples:
      | how          |
      | in place     |
      | with overlap |

  Scenario: A failing overlap does not touch the old engine
    When the operator reloads "chat" with an engine that serves something else with overlap
    Then the operation fails
    And it has the same engine as before

  Scenario: A model that is not there is refused before anything is touched
    When the operator reloads "chat" with a model that is not there
    Then it is refused with "MODEL_REF_INVALID"
    And it has the same engine as before

  Scenario: A reload can be taken back
    When the operator reloads "chat" with the model "stub:new" in place
    Then the operation succeeds
    When the operator rolls back "chat"
    Then the operation succeeds
    And pool "chat" serves the model "stub:old"

  Scenario: Without a reload there is nothing to go back to
    When the operator rolls back "chat"
    Then it is refused with "CONFLICT"

  Scenario: The same again is nothing
    When the operator reloads "chat" with the model "stub:old" in place
    Then the operation succeeds
    And it has the same engine as before
    And it is at revision 1
