-- OMOP CDM 5.4 -> one row per patient: adults seen in 2015 to 2024. Runs on PostgreSQL, DuckDB and SQLite.
-- The window, the codes and the units are agreed by the consortium: change them in every hospital or in none.
-- Columns: omop.schema.json. Needs SELECT on person, visit_occurrence, condition_occurrence, measurement, death,
-- concept_ancestor; where they lie in a schema: ALTER ROLE cohortium SET search_path = cdm;
WITH visit AS (
  SELECT person_id, visit_start_date AS day, visit_concept_id
  FROM visit_occurrence
  WHERE visit_start_date >= '2015-01-01' AND visit_start_date <= '2024-12-31'
),
stay AS (
  SELECT
    person_id,
    MIN(day) AS first_visit,
    COUNT(*) AS visits,
    -- 9201 inpatient, 262 emergency room and inpatient
    SUM(CASE WHEN visit_concept_id IN (9201, 262) THEN 1 ELSE 0 END) AS inpatient_visits
  FROM visit
  GROUP BY person_id
),
-- a code stands for itself and for all that the vocabulary places below it
finding AS (
  SELECT DISTINCT c.person_id, a.ancestor_concept_id AS concept
  FROM condition_occurrence AS c
  INNER JOIN concept_ancestor AS a ON a.descendant_concept_id = c.condition_concept_id
  WHERE a.ancestor_concept_id IN (201820, 316866, 316139, 255573)
    AND c.condition_start_date <= '2024-12-31'
),
diagnosis AS (
  SELECT
    person_id,
    MAX(CASE WHEN concept = 201820 THEN 1 ELSE 0 END) AS diabetes,
    MAX(CASE WHEN concept = 316866 THEN 1 ELSE 0 END) AS hypertension,
    MAX(CASE WHEN concept = 316139 THEN 1 ELSE 0 END) AS heart_failure,
    MAX(CASE WHEN concept = 255573 THEN 1 ELSE 0 END) AS copd
  FROM finding
  GROUP BY person_id
),
-- the last value of each kind, in the one unit that the dictionary states: others are left out, not converted
value AS (
  SELECT
    person_id,
    measurement_concept_id AS concept,
    value_as_number AS number,
    ROW_NUMBER() OVER (
      PARTITION BY person_id, measurement_concept_id
      ORDER BY measurement_date DESC, measurement_id DESC
    ) AS place
  FROM measurement
  WHERE value_as_number IS NOT NULL
    AND measurement_date >= '2015-01-01' AND measurement_date <= '2024-12-31'
    AND (
      (measurement_concept_id = 3004249 AND unit_concept_id = 8876)    -- systolic pressure, mmHg
      OR (measurement_concept_id = 3016723 AND unit_concept_id = 8840) -- creatinine in serum, mg/dL
      OR (measurement_concept_id = 3004410 AND unit_concept_id = 8554) -- haemoglobin A1c, %
    )
),
laboratory AS (
  SELECT
    person_id,
    MAX(CASE WHEN concept = 3004249 THEN number END) AS systolic,
    MAX(CASE WHEN concept = 3016723 THEN number END) AS creatinine,
    MAX(CASE WHEN concept = 3004410 THEN number END) AS hba1c
  FROM value
  WHERE place = 1
  GROUP BY person_id
),
dead AS (
  SELECT DISTINCT person_id FROM death WHERE death_date <= '2024-12-31'
)
SELECT
  p.person_id,
  CASE p.gender_concept_id WHEN 8507 THEN 'male' WHEN 8532 THEN 'female' ELSE 'other' END AS sex,
  p.year_of_birth,
  s.first_visit,
  s.visits,
  s.inpatient_visits,
  COALESCE(d.diabetes, 0) AS diabetes,
  COALESCE(d.hypertension, 0) AS hypertension,
  COALESCE(d.heart_failure, 0) AS heart_failure,
  COALESCE(d.copd, 0) AS copd,
  l.systolic,
  l.creatinine,
  l.hba1c,
  CASE WHEN x.person_id IS NULL THEN 0 ELSE 1 END AS died
FROM person AS p
INNER JOIN stay AS s ON s.person_id = p.person_id
LEFT JOIN diagnosis AS d ON d.person_id = p.person_id
LEFT JOIN laboratory AS l ON l.person_id = p.person_id
LEFT JOIN dead AS x ON x.person_id = p.person_id
WHERE p.year_of_birth <= 1996
